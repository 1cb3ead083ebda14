"""The report in a browser, by hand of a script: hover, zoom, drag, other stages and plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcn_compile.inspect import cli
from qcn_compile.inspect.build import Build
from qcn_compile.inspect.views import decisions

api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture(scope="module")
def page(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The report of a measured build, open; it may fetch nothing and report no error."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        text: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: text.extend(map(str, words)))
        assert cli.main(["profile", str(build), "--json"]) == 0
        (folder / "profile.json").write_text(text[0])
        assert cli.main([str(build), "--html", str(folder / "report.html"), "--profile",
                         str(folder / "profile.json")]) == 0
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1300, "height": 900})
        wrong: list[str] = []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda request: wrong.append(request.url) if "report.html" not in request.url else None)
        opened.goto((folder / "report.html").as_uri())
        opened.wait_for_selector("body[data-ready=yes]")
        opened.folder = folder
        yield opened
        assert wrong == []
        browser.close()


def box(page: Any) -> list[float]:
    """What of the graph is seen: x, y, width, height."""
    return [float(n) for n in page.locator("#graph").get_attribute("viewBox").split()]


def tip(page: Any, what: Any) -> str:
    """The text that hovering over an element shows."""
    page.mouse.move(1, 1)
    what.scroll_into_view_if_needed()
    what.hover(force=True)
    assert page.locator("#tip").is_visible()
    return str(page.locator("#tip").inner_text())


def test_hover_tells_shapes_bytes_and_time(page: Any) -> None:
    text = tip(page, page.locator("#graph g.node", has_text="delta_net").first)
    assert "delta_net" in text and ": f32[T,256]" in text and "from %" in text
    assert "moved at T=1" in text and "µs measured" in text and "GB/s" in text and "kernels " in text
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()
    assert "of the limit" in tip(page, page.locator("#roof circle").first)
    assert "launch 0 to" in tip(page, page.locator("#mem rect").first)
    roof = [tuple(map(float, at.split(","))) for at in page.locator("#roof polyline").get_attribute("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = roof
    assert x0 < x1 < x2 and y0 > y1 == y2  # a slope, then flat
    text = tip(page, page.locator("#passes g", has_text="fuse-moe").first)
    assert "fuse-moe: " in text and " ops\nroute" in text


def test_zoom_drag_and_fit(page: Any) -> None:
    page.locator("#fit").scroll_into_view_if_needed()
    page.locator("#fit").click()
    whole = box(page)
    page.locator("#in").click()
    near = box(page)
    assert near[2] == pytest.approx(whole[2] / 1.4) and near[0] > whole[0]
    at = page.locator("#graph").bounding_box()
    x, y = at["x"] + at["width"] / 4, at["y"] + at["height"] / 4
    page.mouse.move(x, y)
    page.mouse.wheel(0, -100)
    page.wait_for_function("w => document.getElementById('graph').viewBox.baseVal.width < w", arg=near[2] * 0.99)
    nearer = box(page)
    assert nearer[2] == pytest.approx(near[2] / 1.15)
    fixed = [b[0] + b[2] * 0.25 for b in (near, nearer)]  # what is under the pointer stays there
    assert fixed[0] == pytest.approx(fixed[1])
    page.mouse.down()
    page.mouse.move(x - 50, y)
    page.mouse.up()
    dragged = box(page)
    page.mouse.move(x + 100, y)
    assert dragged[0] > nearer[0] and box(page) == dragged  # let go: it stays
    page.locator("#out").click()
    assert box(page)[2] == pytest.approx(1.4 * dragged[2])
    page.locator("#fit").click()
    assert box(page) == whole


def test_fused_ops_are_coloured_and_other_stages_drawn(page: Any) -> None:
    def fills() -> list[str]:
        return page.eval_on_selector_all("#graph g.node rect:nth-child(2)", "e => e.map(r => getComputedStyle(r).fill)")

    final, orange = fills(), "rgb(217, 115, 13)"
    assert final.count(orange) > len(final) // 2
    page.locator("#views").check()
    assert len(fills()) > len(final)
    page.locator("#views").uncheck()
    page.locator("#stage").select_option("as traced")
    assert len(fills()) > 2 * len(final) and orange not in fills()
    page.locator("#stage").select_option("final")
    assert fills() == final


def test_plans_can_be_chosen(page: Any) -> None:
    first = page.locator("#kernels").inner_text()
    page.locator("#kplan").select_option("main-prefill-512")
    assert page.locator("#kernels").inner_text() != first
    cells = page.locator("#kernels tr", has_text="linear").first.locator("td").all_inner_texts()
    assert float(cells[5]) > 0, cells  # measured
    before = page.locator("#memnote").inner_text()
    page.locator("#mplan").select_option("main-prefill-512")
    assert page.locator("#memnote").inner_text() != before


def test_decisions_say_what_was_chosen_what_was_not_and_why(page: Any, build: Path) -> None:
    data = decisions(Build.open(build))
    rows = page.locator("#decisions tr").all_inner_texts()
    assert any(row.startswith("format\tint4\tasked for") for row in rows)
    for kind, key in (("not chosen", "candidates"), ("not done", "rejected")):
        assert sum(row.startswith(kind) for row in rows) == len(data[key])
    assert any("an error changes which experts run" in row for row in rows)


def test_a_screenshot_shows_something(page: Any) -> None:
    shot = page.folder / "report.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 100_000
    kinds = json.loads(page.evaluate("JSON.stringify(['graph','roof','mem','passes'].map(i => "
                                     "document.getElementById(i).getBoundingClientRect().height))"))
    assert min(kinds) > 200
