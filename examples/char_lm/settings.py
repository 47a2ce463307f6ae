"""What the program compares: bits that training keeps / bits that the forward pass uses, of every matrix."""

from ..fashion_mnist.settings import Setting, adamw, packed, packed_adamw

# fan_in is a rule for the fresh weights of a Linear; tables are normally distributed.
TABLES = {name: {"scheme": "midrise"} for name in ("token", "position")}


def fresh(bits, residual_bits=0):
    """Fresh weights on grids that leave them room to grow."""
    return packed(
        bits=bits, residual_bits=residual_bits, scheme="fan_in", rounding="stochastic", seed=1, overrides=TABLES
    )


SETTINGS = {
    "fp32": Setting("float32", lambda model: model, adamw, 2e-3),
    "8/8": Setting("8/8 bits", fresh(8), packed_adamw, 2e-3),
    "4/4": Setting("4/4 bits", fresh(4), packed_adamw, 2e-3),
    "2/2": Setting("2/2 bits", fresh(2), packed_adamw, 3e-3),
    "8/2": Setting("8/2 bits", fresh(2, 6), packed_adamw, 2e-3),
    "4/2": Setting("4/2 bits", fresh(2, 2), packed_adamw, 2e-3),
    "8/1": Setting("8/1 bits", fresh(1, 7), packed_adamw, 2e-3),
    "8/2t": Setting("8/2 bits, torch.optim.AdamW", fresh(2, 6), adamw, 2e-3),
}
