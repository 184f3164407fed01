"""The points of a sweep: methods, scales and what else is swept."""

import pytest

from jaxguide.evaluation import cells
from jaxguide.evaluation.grid import split_list, varied
from jaxguide.generate import Settings

BASE = Settings(num=8, steps=4)


def texts(found):
  return [(cell.method, cell.settings.guidance, cell.settings.scale) for cell in found]


def test_each_method_at_each_scale():
  found = cells(BASE, "cfg,none,cfg:sigma_hi=5,combine=rescaled+dynamic-threshold", [0, 2.5])
  long = ("cfg:sigma_hi=5,combine=rescaled", "dynamic-threshold")
  assert texts(found) == [
    ("cfg", ("cfg",), 0.0),
    ("cfg", ("cfg",), 2.5),
    ("none", ("none",), None),
    ("+".join(long), long, 0.0),
    ("+".join(long), long, 2.5),
  ]
  assert all(cell.settings.num == 8 and cell.settings.steps == 4 for cell in found)
  assert split_list(["cfg:width=1e+3", "seg:blocks=a/b,width=2,none"]) == [
    "cfg:width=1e+3",
    "seg:blocks=a/b,width=2",
    "none",
  ]


def test_fields_and_options_are_swept_together():
  found = cells(BASE, ["cfg", "classifier"], [1, 2], ["steps=10,20", "cfg:sigma_hi=2,inf", "solver=ddim:eta=0.5,heun"])
  assert len(found) == 2 * 2 * 2 * 2 + 2 * 2 * 2  # The option is of cfg alone.
  assert len({cell.name for cell in found}) == len(found)
  values = varied(found)
  assert list(values) == ["scale", "solver", "steps", "cfg:sigma_hi"]
  assert set(values["cfg:sigma_hi"]) == {"2", "inf", None}
  assert set(values["solver"]) == {"ddim:eta=0.5", "heun"}
  same = cells(BASE, ["cfg"], [1], {"steps": [10, 20], "clip": [True, False], "cfg:sigma_hi": [2.5]})
  assert same[0].settings.guidance == ("cfg:sigma_hi=2.5",)
  assert [cell.settings.clip for cell in same] == [True, False, True, False]
  assert cells(BASE, "cfg", [1], ["steps=ddim25", "grid=respaced"])[0].settings.steps == "ddim25"


def test_names_of_files_depend_on_everything_but_the_number_of_samples():
  one, more, other = (
    cells(Settings(**changes), "cfg:sigma_hi=5", [2])[0].name
    for changes in ({"num": 5}, {"num": 9, "batch_size": 3}, {"num": 5, "seed": 1})
  )
  assert one == more != other
  assert one.startswith("cfg_sigma_hi_5_2_")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"guidance": "cgf"}, "unknown guidance 'cgf': did you mean 'cfg'"),
    ({"over": ["step=3"]}, "unknown field of settings 'step': did you mean 'steps'"),
    ({"over": ["steps=3", "steps=4"]}, "steps is swept twice"),
    ({"over": ["steps"]}, "over must be written FIELD=value,value"),
    ({"over": ["num=3,4"]}, "over cannot sweep num"),
    ({"over": ["seed=a"]}, "seed must be a number, got 'a'"),
    ({"over": ["clip=yes"]}, "unknown clip 'yes'"),
    ({"over": ["steps=0"]}, "steps must be .*at least 1"),
    ({"over": {"steps": []}}, "over 'steps' must have at least one value"),
    ({"over": ["pag:blocks=a"]}, "pag:blocks is swept, but no method has the guidance 'pag'"),
    ({"over": ["cfg:lo=1"]}, "'cfg' has no option 'lo'"),
    ({"guidance": "cfg:scale=3"}, "scale is given twice, in scales and in 'cfg:scale=3'"),
    ({"scales": []}, "scales must have at least one number"),
    ({"scales": [float("nan")]}, "scale must be"),
    ({"base": Settings(scale=2.0)}, "scale is given twice"),
    ({"base": Settings(guidance="cfg")}, "guidance is given twice"),
  ],
)
def test_what_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    cells(**{"base": BASE, "guidance": "cfg", "scales": [1], **arguments})


def test_a_text_is_no_list():
  with pytest.raises(TypeError, match="over must be a list of texts"):
    cells(BASE, "cfg", [1], "steps=3,4")
