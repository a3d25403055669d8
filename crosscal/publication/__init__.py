"""Which model is the published one of a domain: models as artifacts, a pointer with history, a policy that moves it.

`policy` is imported by itself: it compares models, which `crosscal publish` need not load anything for.
"""

from crosscal.publication.models import model_folder, publish_model
from crosscal.publication.pointer import Pointer, Published

__all__ = ["Pointer", "Published", "model_folder", "publish_model"]
