"""Parameters whose data are integers, on a PyTorch that lets only floating point tensors require gradients.

To callers such a parameter has the face that bitorch_engine gave it: it is an nn.Parameter in parameters() and in the
state_dict, its dtype is the integer one, .data can be assigned, .requires_grad is True, and after a backward pass .grad holds
the gradient. To autograd it is a constant; the gradient comes by a float handle that stands in for it in the graph.
"""

import torch


class IntegerParameter(torch.nn.Parameter):
    """An nn.Parameter of any dtype with its own `requires_grad` and `grad`.

    requires_grad: what callers asked for; it decides whether layers compute a gradient. Autograd itself is told False.
    grad: None or a tensor of this shape, of any dtype. Backward passes add to it.
    """

    _attributes = ()  # names of further attributes and arguments, in this order
    _defaults = {}  # what they are when not given, unless None

    def __new__(cls, data=None, requires_grad=True, *values, **attributes):
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data.detach(), False)
        self._wants_grad = bool(requires_grad)
        self._held_grad = None
        self._touches = 0
        return self

    def __init__(self, data=None, requires_grad=True, *values, **attributes):
        attributes = {**dict(zip(self._attributes, values)), **attributes}
        for name in self._attributes:
            setattr(self, name, attributes.pop(name, self._defaults.get(name)))
        # accelerate.init_empty_weights makes a parameter anew from all that its __dict__ holds.
        unknown = [name for name in attributes if not name.startswith("_") and name != "requires_grad"]
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown argument {unknown[0]}")

    @property
    def data(self):
        self._touches += 1  # the caller may write to it, which no version counter sees
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        self._touches += 1
        torch.Tensor.data.__set__(self, value)

    @property
    def content_version(self):
        """Changes whenever the data may have changed: what is derived from them (packed forms) is good for one version."""
        return self._touches, self._version

    @property
    def requires_grad(self):
        return self._wants_grad

    @requires_grad.setter
    def requires_grad(self, value):
        self._wants_grad = bool(value)

    def requires_grad_(self, requires_grad=True):
        self._wants_grad = bool(requires_grad)
        return self

    @property
    def grad(self):
        return self._held_grad

    @grad.setter
    def grad(self, value):
        if value is not None and value.shape != self.shape:
            raise ValueError(f"{type(self).__name__}: grad is {list(value.shape)}, expected {list(self.shape)}")
        self._held_grad = value

    @grad.deleter
    def grad(self):
        self._held_grad = None

    def accumulate_grad(self, gradient):
        """grad += gradient, as a backward pass does for ordinary parameters."""
        self._held_grad = gradient if self._held_grad is None else self._held_grad + gradient

    def _state(self):
        return {name: getattr(self, name) for name in self._attributes}

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self._state().items()}
        result = type(self)(self.detach().clone(), self._wants_grad, **copied)
        result._held_grad = None if self._held_grad is None else self._held_grad.clone()
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self), self.detach(), self._wants_grad, self._state())

    def __repr__(self, *, tensor_contents=None):
        return f"{type(self).__name__}({self.detach()!r}, requires_grad={self._wants_grad})"

    @staticmethod
    def update(
        qweight,
        exp_avg_s=None,
        exp_avg_l=None,
        step=None,
        lr=1e-4,
        weight_decay=0.0,
        beta1=0.99,
        beta2=0.9999,
        eps=1e-6,
        dtype=torch.half,
        correct_bias=None,
        projector=None,
        grad=None,
    ):
        """One optimizer step on qweight in place; the subclasses say which rule."""
        raise NotImplementedError(f"update: no rule for {type(qweight).__name__}")


class MasterParameter(torch.nn.Parameter):
    """The float weight that a layer starts with. Integers assigned to .data make it the integer parameter of its layer, in
    place: bitorch_engine's users write `layer.weight.data = other.weight.data` without preparing `layer` first.
    """

    _touches = 0

    def __new__(cls, data, requires_grad=True, integer_class=None):
        self = super().__new__(cls, data, requires_grad)
        self._integer_class = integer_class
        return self

    @property
    def data(self):
        self._touches += 1  # see IntegerParameter.data
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        if value.is_floating_point():
            self._touches += 1
            torch.Tensor.data.__set__(self, value)
            return
        wants = self.requires_grad
        self.requires_grad_(False)
        self.grad = None
        torch.Tensor.data.__set__(self, value)
        self.__class__ = self._integer_class
        self._wants_grad, self._held_grad = wants, None
        self.__init__(None, wants)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = MasterParameter(self.detach().clone(), self.requires_grad, self._integer_class)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return MasterParameter, (self.detach(), self.requires_grad, self._integer_class)


def _rebuild(cls, data, requires_grad, state):
    return cls(data, requires_grad, **state)


def wants_gradient(parameter):
    """Whether a backward pass has to bring this parameter a gradient: asked of the parameter, not of the layer's mode."""
    return parameter is not None and torch.is_grad_enabled() and parameter.requires_grad


def gradient_handle(shape, dtype, device, receive):
    """A leaf of that shape without storage of its own, to stand for an integer weight in the graph.

    After the backward pass has computed the leaf's gradient, receive(gradient) is called and the leaf lets go of it.
    """
    handle = torch.zeros((), dtype=dtype, device=device).expand(shape).detach().requires_grad_()

    def hand_over(leaf):
        gradient, leaf.grad = leaf.grad, None
        receive(gradient)

    handle.register_post_accumulate_grad_hook(hand_over)
    return handle
