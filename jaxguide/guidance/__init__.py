r"""Guidance: functions from a denoiser to a guided denoiser.

There is *one meaning of* ``scale``: the power ``γ`` in ``p(x) p(y|x)^γ``. 0 is unconditional, 1 is conditional, more is
sharper and less diverse. For classifier-free guidance it is ``uncond + γ (cond - uncond)``, and the paper's ``w`` is
``γ - 1``; for classifier guidance of an unconditional model it is the factor on the classifier's gradient. Away from 0
and 1 neither method samples ``p(x) p(y|x)^γ`` exactly, since the noisy marginals of that density are others;
`jaxguide.sample_product` does.

Guided denoisers are pytrees whose leaves are the denoiser's parameters and the scales, so that one compiled program
serves a sweep. They compose by application, ``guidance(denoise)``, or with `chain`.
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
