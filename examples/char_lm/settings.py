"""Those settings of the Fashion-MNIST program that make sense for a transformer whose every matrix is packed."""

from dataclasses import replace

from ..fashion_mnist import settings as image_settings

# Name -> learning rate: coarse grids move in coarse steps and want larger ones.
_RATES = {"fp32": 2e-3, "8p": 2e-3, "4": 2e-3, "4p": 2e-3, "8/2": 2e-3, "8/1": 2e-3, "4/2": 3e-3, "2p": 3e-3, "1p": 3e-3}

SETTINGS = {
    name: replace(image_settings.SETTINGS[name], lr=rate) for name, rate in _RATES.items() if name in image_settings.SETTINGS
}
