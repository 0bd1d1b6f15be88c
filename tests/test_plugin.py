"""The server of the Saturation tab, with data from TensorBoard's own reader of event files."""

import json
import operator
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client
from werkzeug.wrappers import Request

from tests.conftest import record
from tests.test_tensorboard import ALERT, snapshots, write
from torchsat import Head, Snapshot, read
from torchsat.metrics import METRICS
from torchsat.record import RECORD_METRICS, Nearest
from torchsat.tensorboard import SCRIPTS, writer
from torchsat.tensorboard import plugin as module
from torchsat.tensorboard.loader import OBSERVATIONS, Loader
from torchsat.tensorboard.plugin import PAGES, SaturationPlugin
from torchsat.view import from_snapshots


class Server:
    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer(tensor_size_guidance={"torchsat": 1000})
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        self.plugin = SaturationPlugin(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
        apps = self.plugin.get_plugin_apps()

        @Request.application
        def answer(request: Request) -> Any:
            return apps[request.path]

        self.client = Client(answer)
        self.apps = apps

    def get(self, path: str, **query: str) -> Any:
        return self.client.get(path, query_string=query)

    def grid(self, path: str, **query: str) -> tuple[list[str], list[float], np.ndarray]:
        data = self.get(path, **query).data
        (length,) = struct.unpack_from("<I", data)
        head = json.loads(data[4 : 4 + length])
        steps = np.frombuffer(data, "<f8", head["count"], 4 + length)
        values = np.frombuffer(data, "<f4", offset=4 + length + 8 * head["count"])
        return head["names"], steps.tolist(), values.reshape(head["count"], len(head["names"]))


RUN = str(Path("run", "torchsat"))


@pytest.fixture
def served(tmp_path: Path) -> Server:
    write(tmp_path / "run", snapshots(6, sites=3))
    with SummaryWriter(str(tmp_path / "other")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    return Server(tmp_path)


def test_runs_are_those_that_hold_our_data(served: Server) -> None:
    (found,) = served.get("/runs").json
    verdict = found.pop("verdict")
    # TensorBoard lists the user's run `other` too, and gives colours by the place in that list.
    assert found == {"name": RUN, "time": 1005.0, "sites": 3, "place": 0}
    assert (verdict["health"], verdict["sentence"]) == ("healthy", "healthy: its alert has cleared")


def test_every_run_has_its_verdict_before_it_is_opened(tmp_path: Path) -> None:
    calm = [replace(each, alerts=()) for each in snapshots(6)]
    fires = replace(ALERT, site="b.act", since=1, also=("c.act",))
    write(tmp_path / "calm", calm)
    write(tmp_path / "sick", [replace(each, alerts=(fires,) if each.step == 4 else ()) for each in calm])
    write(tmp_path / "broken", [replace(each, alerts=(replace(fires, rule="nonfinite"),) if each.step == 4 else ()) for each in calm])
    write(tmp_path / "unknown", [replace(each, judged=False) for each in calm])
    write(tmp_path / "near", [replace(each, nearest=Nearest("a", "shrunk_weights", each.step / 10)) for each in calm])
    server = Server(tmp_path)
    before = {Path(run["name"]).parts[0]: run["verdict"] for run in server.get("/runs").json}
    health = {"broken": "not finite", "calm": "healthy", "near": "healthy", "sick": "critical", "unknown": "not judged"}
    assert {name: verdict["health"] for name, verdict in before.items()} == health
    assert before["unknown"]["sentence"] == "not judged: no rules were given"
    assert (before["near"]["margin"], before["calm"]["margin"]) == ("nearest to a limit: a, 50 % of the way to a warning (shrunk weights)", "")
    assert before["sick"]["where"] == "b.act (tanh) and 1 more place"
    assert before["sick"]["since"] == 1
    # Once a run is opened, its verdict comes from the whole of it, and is the same.
    for name, verdict in before.items():
        assert server.get("/run", run=str(Path(name, "torchsat"))).json["verdict"] == verdict
    assert {Path(run["name"]).parts[0]: run["verdict"] for run in server.get("/runs").json} == before


def test_an_alert_of_a_session_that_a_later_one_made_void_is_not_in_the_verdict(tmp_path: Path) -> None:
    calm = [replace(each, alerts=()) for each in snapshots(6)]
    write(tmp_path / "run", [replace(each, alerts=(replace(ALERT, step=3),) if each.step == 3 else ()) for each in calm])
    write(tmp_path / "run", [replace(each, time=each.time + 100) for each in calm if each.step >= 2])
    assert [run["verdict"]["health"] for run in Server(tmp_path).get("/runs").json] == ["healthy"]


def test_the_users_scalars_stand_beside_a_run(tmp_path: Path) -> None:
    write(tmp_path / "run", snapshots(3))
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(4):
            for tag, value in (("val/loss", 9.0), ("train/loss", 3.0 - step), ("lr-Adam", 0.5), ("accuracy", 0.1)):
                writer.add_scalar(tag, value, step)
    server = Server(tmp_path)
    assert server.get("/scalars", run=RUN).json == {
        "tags": ["accuracy", "lr-Adam", "train/loss", "val/loss"],
        "loss": "train/loss",
        "rate": "lr-Adam",
    }
    names, steps, values = server.grid("/scalar", run=RUN, tag="train/loss")
    assert (names, steps, values[:, 0].tolist()) == (["train/loss"], [0, 1, 2, 3], [3.0, 2.0, 1.0, 0.0])
    assert server.get("/scalar", run=RUN, tag="torchsat/alerts").status_code == 400


def test_what_is_served_is_what_was_written(served: Server) -> None:
    expected = from_snapshots(RUN, snapshots(6, sites=3))
    assert served.get("/run", run=RUN).json == json.loads(json.dumps(expected.describe()))
    for metric in METRICS:
        names, steps, values = served.grid("/values", run=RUN, metric=metric.name)
        assert names == ["a.act", "b.act", "c.act"]
        assert steps == [0, 1, 2, 3, 4, 5]
        np.testing.assert_array_equal(values, expected.values[metric.name])
    names, steps, values = served.grid("/site", run=RUN, site="b.act")
    assert names == [metric.name for metric in METRICS]
    np.testing.assert_array_equal(values, expected.site("b.act").values)
    names, steps, values = served.grid("/histogram", run=RUN, site="a.act")
    assert (len(names), steps) == (49, [0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(values, 1 / 49, rtol=1e-6)


def test_heads_of_a_softmax(tmp_path: Path) -> None:
    given = [
        Snapshot(step, 1.0 + step, (record("x"), record("s", kind="softmax", heads=tuple(Head(1, step / 10 + k, 0.1, 1.0, 2.0) for k in range(2)))))
        for step in range(3)
    ]
    write(tmp_path / "run", given)
    names, steps, values = Server(tmp_path).grid("/heads", run=RUN, site="s")
    assert (names, steps) == (["0", "1"], [0, 1, 2])
    np.testing.assert_allclose(values, [[0.0, 1.0], [0.1, 1.1], [0.2, 1.2]], rtol=1e-6)


def test_a_metric_that_an_older_file_lacks_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = snapshots(3, sites=2)
    with monkeypatch.context() as older:
        names = tuple(name for name in RECORD_METRICS if name != "logit_std")
        older.setattr(writer, "RECORD_METRICS", names)
        older.setattr(writer, "_RECORD_METRICS", operator.attrgetter(*names))
        write(tmp_path / "run", given)
    server = Server(tmp_path)
    assert np.isnan(server.grid("/values", run=RUN, metric="logit_std")[2]).all()
    np.testing.assert_array_equal(server.grid("/values", run=RUN, metric="zeros")[2], from_snapshots(RUN, given).values["zeros"])
    assert read(tmp_path / "run")[0].records[0].logit_std is None


@pytest.mark.parametrize(
    ("path", "query", "reason"),
    [
        ("/run", {}, "the argument 'run' is missing"),
        ("/run", {"run": "../../etc/passwd"}, "run='../../etc/passwd' is not known; the runs are 'run/torchsat'"),
        ("/values", {"run": RUN}, "the argument 'metric' is missing"),
        ("/values", {"run": RUN, "metric": "<b>"}, "metric='<b>' is not known; the metrics are 'alert_level', 'excess', "),
        ("/site", {"run": RUN, "site": "x" * 1000}, "is not known; the sites are 'a.act', 'b.act', 'c.act'"),
        ("/histogram", {"run": RUN, "site": ""}, "site='' is not known"),
        ("/heads", {"run": "other", "site": "a.act"}, "run='other' is not known"),
    ],
)
def test_a_bad_query_is_answered_with_the_reason(served: Server, path: str, query: dict[str, str], reason: str) -> None:
    answer = served.get(path, **query)
    assert answer.status_code == 400
    assert reason in answer.text
    assert len(answer.text) < 1000
    assert answer.content_type.startswith("text/plain")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_only_the_page_is_served_as_files(served: Server) -> None:
    folder = Path(module.__file__).parent / "static"
    assert set(PAGES) == {path.name for path in folder.iterdir()} - {"page.js"}
    for name, kind in PAGES.items():
        answer = served.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.content_type.startswith(kind)
        assert answer.data == (folder / name).read_bytes()
    assert {path for path in served.apps if "." in path and not path.startswith("/docs/")} == {f"/{name}" for name in PAGES}


def test_each_script_stands_behind_those_that_it_imports() -> None:
    folder = Path(module.__file__).parent / "static"
    for at, name in enumerate(SCRIPTS):
        imported = re.findall(r'^import .* from "\./(.*)";$', (folder / name).read_text(), re.MULTILINE)
        assert set(imported) <= set(SCRIPTS[:at]), name


def test_no_two_scripts_have_a_name_in_common() -> None:
    """The page of the report joins them to one script."""
    folder = Path(module.__file__).parent / "static"
    declared = r"^(?:export )?(?:async )?(?:function\*? |const |let |class )(\w+)"
    texts = [(folder / name).read_text() for name in (*SCRIPTS, "page.js")]
    names = [found for text in texts for found in re.findall(declared, text, re.MULTILINE)]
    several = [found for text in texts for found in re.findall(r"^const \[(.*?)\] = ", text, re.MULTILINE)]
    names += [name for each in several for name in each.split(", ")]
    assert len(names) > 50
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_an_answer_is_bounded(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 9)
    _, steps, values = served.grid("/values", run=RUN, metric="z_mean")
    assert steps == [0, 2, 5]
    assert values.shape == (3, 3)


def test_a_resumed_run_with_other_sites_is_one_run(tmp_path: Path) -> None:
    write(tmp_path / "run", snapshots(6, sites=2))
    later = [replace(snapshot, time=2000.0 + snapshot.step) for snapshot in snapshots(8, sites=3)[3:]]
    write(tmp_path / "run", [replace(snapshot, alerts=()) for snapshot in later])
    server = Server(tmp_path)
    names, steps, values = server.grid("/values", run=RUN, metric="saturated")
    assert names == ["a.act", "b.act", "c.act"]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7]
    assert np.isnan(values[:3, 2]).all()
    np.testing.assert_allclose(values[3:], [[0, 0.125 / 3, 0.25 / 3]] * 5, rtol=1e-6)
    assert server.get("/run", run=RUN).json["alerts"] == []


def test_a_resumed_run_leaves_nothing_of_the_lost_session(tmp_path: Path) -> None:
    given = snapshots(6, sites=2)
    raised = replace(ALERT, site="a.act", step=1)
    given[1] = replace(given[1], alerts=(raised,))
    write(tmp_path / "run", given)
    other = [Snapshot(step, 2000.0 + step, (record("new"),)) for step in range(3, 8)]
    write(tmp_path / "run", other)
    server = Server(tmp_path)
    _, steps, _ = server.grid("/histogram", run=RUN, site="a.act")
    assert steps == [0, 1, 2]
    (alert,) = server.get("/run", run=RUN).json["alerts"]
    assert (alert["site"], alert["fired"], alert["cleared"], alert["gone"]) == ("a.act", 1, 2, True)
    assert from_snapshots(RUN, read(tmp_path)).describe()["alerts"] == [alert]


def test_newer_data_are_read(tmp_path: Path) -> None:
    write(tmp_path / "run", snapshots(3))
    multiplexer = EventMultiplexer(tensor_size_guidance={"torchsat": 1000})
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    server = Server(tmp_path)
    server.plugin._provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    assert server.get("/run", run=RUN).json["observations"] == 3
    write(tmp_path / "run", [replace(snapshot, time=3000.0 + snapshot.step) for snapshot in snapshots(6)[3:]])
    multiplexer.Reload()
    assert server.get("/run", run=RUN).json["observations"] == 6


def test_names_are_data(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    write(tmp_path / "run", [Snapshot(0, 1.0, (record(name),), alerts=(replace(ALERT, site=name, step=0, message="</script>"),))])
    answer = Server(tmp_path).get("/run", run=RUN)
    assert answer.content_type.startswith("application/json")
    assert answer.json["sites"][0]["site"] == name
    assert answer.json["alerts"][0]["message"] == "</script>"


def test_a_run_of_another_version_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("torchsat.tensorboard.FORMAT", 99)
        write(tmp_path / "run", snapshots(1))
    assert Server(tmp_path).get("/runs").json == []


def test_the_tab_asks_for_more_observations_unless_the_user_did() -> None:
    flags = SimpleNamespace(samples_per_plugin={})
    Loader().fix_flags(flags)
    assert flags.samples_per_plugin == {"torchsat": OBSERVATIONS}
    flags = SimpleNamespace(samples_per_plugin={"torchsat": 7})
    Loader().fix_flags(flags)
    assert flags.samples_per_plugin == {"torchsat": 7}


def test_the_entry_point_is_found() -> None:
    from importlib import metadata

    (entry,) = (each for each in metadata.entry_points(group="tensorboard_plugins") if each.name == "torchsat")
    assert entry.value == "torchsat.tensorboard.loader:Loader"
    plugin = Loader().load(TBContext())
    assert plugin.plugin_name == "torchsat"
    assert not plugin.is_active()
    assert plugin.frontend_metadata().tab_name == "Saturation"
