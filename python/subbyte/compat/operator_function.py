"""The old autograd functions as names for operators that bring their own gradient."""

import torch


class OperatorFunction:
    """What `SomeFunction.apply(...)` of the original is here: a call of an operator, `run`, that autograd knows.

    forward(ctx, ...) and backward(ctx, gradient) exist for code that calls them directly: ctx may be any object that takes
    attributes; backward returns one entry for each argument of forward, None where there is no gradient.
    """

    @staticmethod
    def run(*args):
        raise NotImplementedError

    @classmethod
    def apply(cls, *args):
        return cls.run(*args)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)

        def forward(ctx, *args):
            with torch.enable_grad():
                inputs = [
                    a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
                ]
                output = cls.run(*inputs)
            ctx.operator_inputs, ctx.operator_output = inputs, output
            return output.detach()

        def backward(ctx, output_gradient):
            floats = [a for a in ctx.operator_inputs if isinstance(a, torch.Tensor) and a.requires_grad]
            gradients = iter(
                torch.autograd.grad(ctx.operator_output, floats, output_gradient, allow_unused=True) if floats else ()
            )
            return tuple(
                next(gradients) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in ctx.operator_inputs
            )

        cls.forward, cls.backward = staticmethod(forward), staticmethod(backward)
