"""The points of a sweep: methods, scales and what else is swept."""

import pytest

from jaxguide.evaluation import Cell, cells
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
    ({"over": ["scale=3,4"]}, r"over cannot sweep scale: give it by scales \(--scales"),
    ({"over": ["steps=3,3"]}, "steps has 3 twice: give each value once"),
    ({"over": ["cfg:sigma_hi=3,3"]}, "cfg:sigma_hi has 3 twice"),
    ({"scales": [0, 1, 0.0]}, "scales has 0 twice: give each value once"),
    ({"guidance": "none", "scales": [0, 1]}, r"guidance none takes no scale: leave out scales \(--scales\)"),
    ({"guidance": "clip,none", "scales": None, "base": Settings(scale=2)}, "guidance clip, none takes no scale"),
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


def test_a_scale_in_the_text_is_the_scale():
  found = cells(BASE, "cfg:scale=3,sigma_hi=5+clip,classifier:scale=1", None)
  assert texts(found) == [
    ("cfg:sigma_hi=5+clip", ("cfg:sigma_hi=5", "clip"), 3.0),
    ("classifier", ("classifier",), 1.0),
  ]
  assert [cell.settings.scale for cell in cells(BASE, "cfg", None, ["cfg:scale=1,2"])] == [1.0, 2.0]
  assert len(cells(BASE, "cfg,cfg:scale=2", None, default_scales=[1, 2])) == 2


def test_values_that_mean_the_same_do_not_differ(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = [
    Cell("cfg", Settings(model=model, solver=solver, guidance=(guidance,), scale=2, seed=seed))
    for model, solver, guidance, seed in (
      ("model", "ddim", "cfg:sigma_hi=2", 0),
      (tmp_path / "model", "ddim:eta=0.0", "cfg:sigma_hi=2.0", 1),
    )
  ]
  assert varied(found) == {"scale": [2.0, 2.0], "seed": [0, 1]}


def test_a_variance_is_not_that_of_the_model_which_may_be_another():
  found = [Cell("cfg", Settings(solver=solver, scale=2)) for solver in ("ddpm", "ddpm:variance=small")]
  assert varied(found) == {"scale": [2.0, 2.0], "solver": ["ddpm", "ddpm:variance=small"]}


def test_points_that_nothing_tells_apart_have_their_names():
  found = [Cell("cfg", Settings(labels=labels, scale=scale)) for labels, scale in (((1,), 1), (("1",), 1), ((1,), 2))]
  assert varied(found) == {"scale": [1.0, 1.0, 2.0], "point": [found[0].name, found[1].name, None]}
