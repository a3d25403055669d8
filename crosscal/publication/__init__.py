"""Which model is the published one of a domain: models as artifacts, a pointer with history, a policy that moves it."""

from crosscal.publication.models import model_folder, publish_model
from crosscal.publication.pointer import Pointer, Published
from crosscal.publication.policy import Decision, Rule, decide

__all__ = ["Decision", "Pointer", "Published", "Rule", "decide", "model_folder", "publish_model"]
