"""The published model of each domain: models as artifacts, a pointer with history, a policy that moves it.

`policy` is imported separately: it compares models, and `crosscal publish` need not load what that takes.
"""

from crosscal.publication.models import model_folder, publish_model
from crosscal.publication.pointer import Pointer, Published

__all__ = ["Pointer", "Published", "model_folder", "publish_model"]
