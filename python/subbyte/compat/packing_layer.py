"""What the layers with a float master weight and a packed form share: when to pack, and the scale of the input."""

import torch

STALE = "stale"  # as a version: of no weight


class ContentVersion:
    """What tells whether tensors still hold what they held: equal as long as no in-place write and no assignment is seen.

    It keeps the storage alive, so that another tensor in the same place is not taken for the old one.
    """

    def __init__(self, *tensors):
        self.seen = [(t, t.detach(), t._version, getattr(t, "_touches", 0)) for t in tensors if t is not None]
        self.count = len(tensors)

    def __eq__(self, other):
        return (
            isinstance(other, ContentVersion)
            and self.count == other.count
            and len(self.seen) == len(other.seen)
            and all(
                a[0] is b[0] and a[1].data_ptr() == b[1].data_ptr() and a[1].dtype == b[1].dtype and a[2:] == b[2:]
                for a, b in zip(self.seen, other.seen)
            )
        )

    __hash__ = None


class PackingState:
    """A module with `weight` (float or int8 master, None after a qweight_only packing) and buffer `qweight` (packed, or None).

    In training mode the layer computes from weight, in eval from qweight, which is packed when it is missing or when weight has
    changed since; `layer.training = False`, `layer.qweight = None` and `layer.weight.data = ...` work as means of it.
    """

    def _init_packing(self):
        self.register_buffer("qweight", None)
        self._packed_from = None  # the version of weight that qweight belongs to

    def _weight_version(self):
        return None if self.weight is None else ContentVersion(self.weight)

    def _note_training(self):
        """A training step may follow, also by means that no version counter sees."""
        if self.weight is not None:
            self._packed_from = STALE

    def _ensure_packed(self):
        version = self._weight_version()
        if self.qweight is None:
            if version is None:
                raise RuntimeError(f"{type(self).__name__}: there is neither weight nor qweight")
            self.generate_quantized_weight()
        elif self._packed_from is None:
            self._packed_from = version
        elif version is not None and self._packed_from != version:
            self.generate_quantized_weight()
        return self.qweight

    def _set_qweight(self, qweight, qweight_only):
        self.qweight = qweight
        if qweight_only:
            self.weight = None
        self._packed_from = self._weight_version()

    @property
    def opt_weight(self):
        """weight in training mode, qweight in eval."""
        if self.training and self.weight is not None:
            return self.weight
        return self._ensure_packed()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = state_dict.get(prefix + "qweight")
        if given is not None:
            if self.qweight is None or self.qweight.shape != given.shape:
                device = self.qweight.device if self.qweight is not None else self._device()
                self.qweight = torch.empty_like(given, device=device)
            if prefix + "weight" not in state_dict:
                self.weight = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._packed_from = None if given is not None else STALE

    def __getstate__(self):
        # Versions speak of these tensors; a copy knows only whether it is up to date.
        version = self._weight_version()
        current = version is None or self._packed_from is None or self._packed_from == version
        return {**self.__dict__, "_packed_from": None if current else STALE}

    def _device(self):
        return next((t.device for t in (*self._parameters.values(), *self._buffers.values()) if t is not None), None)


class LearnedScales:
    """A module whose scalar parameters, named in `_scales`, are 0 until they are initialised from data.

    That they are is recorded, and saved as `<name>_set`, so that a scale which training drives to 0 is not taken for a new one.
    """

    _scales = ("scale_a",)

    def _init_scales(self):
        self._set_scales = set()

    def _scale(self, name, initial):
        """The scale, initialised to initial() in training. In eval an uninitialised one is formed and not kept."""
        scale = getattr(self, name)
        if name not in self._set_scales:
            if bool(scale.detach() != 0):
                self._set_scales.add(name)
            else:
                value = initial().detach().to(scale.dtype).reshape(scale.shape)
                if not self.training:
                    return value
                with torch.no_grad():
                    scale.copy_(value)
                self._set_scales.add(name)
        return scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._scales:
            destination[f"{prefix}{name}_set"] = torch.tensor(name in self._set_scales)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        flags = {name: state_dict.get(f"{prefix}{name}_set") for name in self._scales}
        rest = {key: value for key, value in state_dict.items() if key not in {f"{prefix}{name}_set" for name in self._scales}}
        super()._load_from_state_dict(rest, prefix, *args)
        for name, flag in flags.items():
            known = bool(flag) if flag is not None else bool(getattr(self, name).detach() != 0)
            (self._set_scales.add if known else self._set_scales.discard)(name)
