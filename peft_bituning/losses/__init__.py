"""The two losses of the method: recommendation (Eq. 8) and load balancing (Eqs. 9-11)."""

from .catalog_contrastive import catalog_contrastive_loss
from .load_balancing import load_balancing_loss

__all__ = ["catalog_contrastive_loss", "load_balancing_loss"]
