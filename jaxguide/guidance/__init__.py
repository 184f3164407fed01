r"""Guidance: functions from a denoiser to a guided denoiser.

``scale`` has *one meaning* everywhere: the power ``γ`` in ``p(x) p(y|x)^γ``. 0 is unconditional and 1 is conditional.
Larger values give sharper and less diverse samples. Classifier-free guidance is ``uncond + γ (cond - uncond)``; the
``w`` of its paper is ``γ - 1``. In classifier guidance of an unconditional model, ``γ`` multiplies the classifier's
gradient. For ``γ`` other than 0 and 1 neither method samples ``p(x) p(y|x)^γ`` exactly, because the scores that they
follow are not those of its noisy marginals. `jaxguide.sample_product` samples it.

Guided denoisers are pytrees. Their leaves are the denoiser's parameters and the scales, so one compiled program serves
a sweep over scales. Apply a guidance to a denoiser, ``guidance(denoise)``, or combine several with `chain`.
"""

from jaxguide.guidance.algebra import chain, interval, parallel, unconditional
from jaxguide.guidance.clipping import clip_x0, dynamic_threshold
from jaxguide.guidance.gradients import backward_guidance, classifier, normalized, reconstruction
from jaxguide.guidance.mixing import autoguidance, classifier_free, compose
from jaxguide.guidance.rule import Rule

__all__ = [
  "Rule",
  "autoguidance",
  "backward_guidance",
  "chain",
  "classifier",
  "classifier_free",
  "clip_x0",
  "compose",
  "dynamic_threshold",
  "interval",
  "normalized",
  "parallel",
  "reconstruction",
  "unconditional",
]
