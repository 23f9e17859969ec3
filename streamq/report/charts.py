"""The charts of a page in Vega-Lite, by the place that they are drawn in.

Data lies beside them under ``cells``, ``errors``, ``sizes`` and ``bins``; colours of text, and
the room that labels have, depend on the reader and are set in page.js.
"""

from __future__ import annotations

from typing import Any

from .fold import MIXED

Spec = dict[str, Any]

#: Colours that are told apart in the dark, in the light, and by most eyes; schemes take them in
#: the order of their bytes.
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")
KEPT = ("#9a9fa8", "#b9bdc4", "#7c818a", "#cfd2d7")

_MORE_IS_WORSE = {"scheme": "viridis", "reverse": True}
#: What the map of losses shows: field, title, format of numbers and of axes, colours.
METRICS = {
    "sqnr_db": ("SQNR (dB)", ".2f", ".1~f", {"scheme": "viridis"}),
    "against_db": ("dB against scheme", "+.2f", "+.2~f",
                   {"scheme": "redblue", "domainMid": 0}),
    "max_error": ("Largest error", ".3~g", ".3~g", _MORE_IS_WORSE),
    "max_error_rms": ("Error / RMS", ".3~f", ".3~f", _MORE_IS_WORSE),
    "clipped": ("Clipped", ".3~%", ".3~%", _MORE_IS_WORSE),
}  # fmt: skip
#: Height of a row of cells, in pixels.
ROW = 19


def charts(data: dict[str, Any]) -> dict[str, Any]:
    """All charts of a page: specs by name, and of METRICS by name and field."""
    measured = {c["row"] for c in data["cells"] if c["max_error"] is not None}
    inside = (c for c in data["cells"] if c["main"] and c["number"] is not None)
    numbers = sorted({c["number"] for c in inside})
    rows = [row for row in data["rows"] if row in measured]
    mixed = any(c["scheme"] == MIXED for c in data["cells"])
    return {
        "sizes": _sizes(data["schemes"]),
        "map": _map(data["schemes"], data["rows"], data["layers"], mixed),
        "heat": {name: _heat(name, rows, data["layers"]) for name in METRICS},
        "lines": {name: _lines(name, rows, numbers) for name in METRICS},
        "errors": _errors(),
        "weights": _weights(),
    }


def _chart(data: str, **more: Any) -> Spec:
    return {"data": {"name": data}, "width": "container", **more}


def _grid(rows: list[str], layers: list[str]) -> Spec:
    return {
        "x": {"field": "layer", "type": "ordinal", "sort": layers, "title": "layer",
              "scale": {"paddingInner": min(0.06, 0.0025 * len(layers)), "paddingOuter": 0},
              "axis": {"labelAngle": 0, "labelOverlap": "parity", "labelSeparation": 4,
                       "ticks": False, "domain": False}},
        "y": {"field": "row", "type": "ordinal", "sort": rows, "title": None,
              "scale": {"paddingInner": 0.1, "paddingOuter": 0},
              "axis": {"ticks": False, "domain": False, "labelOverlap": False,
                       "labelPadding": 6}},
    }  # fmt: skip


def _tips() -> list[Spec]:
    """What is said of a cell under the pointer."""
    return [
        {"field": "row", "title": "kind"}, {"field": "layer", "title": "layer"},
        {"field": "schemes", "title": "scheme"}, {"field": "tensors", "title": "tensors"},
        {"field": "lowest_sqnr_db", "title": "lowest SQNR (dB)", "format": ".2f"},
        *({"field": name, "title": title, "format": form}
          for name, (title, form, *_) in METRICS.items()),
    ]  # fmt: skip


def _range(schemes: list[Spec]) -> tuple[list[str], list[str]]:
    """Labels of schemes and kept dtypes, and their colours."""
    quantized = [s["label"] for s in schemes if s["scheme"]]
    kept = [s["label"] for s in schemes if not s["scheme"] and s["label"] not in quantized]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(quantized))]
    return [*quantized, *kept], [*colours, *(KEPT[i % len(KEPT)] for i in range(len(kept)))]


def _sizes(schemes: list[Spec]) -> Spec:
    labels, colours = _range(schemes)
    return _chart(
        "sizes", height=68, mark={"type": "bar", "cornerRadius": 2},
        encoding={
            "y": {"field": "when", "type": "nominal", "sort": ["before", "after"], "title": None,
                  "axis": {"ticks": False, "domain": False}},
            "x": {"field": "bytes", "type": "quantitative", "title": "bytes", "stack": "zero",
                  "axis": {"format": ".3~s", "tickCount": 5, "grid": True}},
            "color": {"field": "label", "type": "nominal", "title": None,
                      "scale": {"domain": labels, "range": colours}},
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [{"field": "label", "title": "scheme"},
                        {"field": "when", "title": "when"},
                        {"field": "tensors", "title": "tensors"},
                        {"field": "bytes", "title": "bytes", "format": ","}],
        },
    )  # fmt: skip


def _map(schemes: list[Spec], rows: list[str], layers: list[str], mixed: bool) -> Spec:
    labels, colours = _range(schemes)
    if mixed:
        labels, colours = [*labels, MIXED], [*colours, "#d62f8f"]
    colour = {"field": "scheme", "type": "nominal", "title": None,
              "scale": {"domain": labels, "range": colours}}  # fmt: skip
    return _chart(
        "cells", height=ROW * len(rows), mark={"type": "rect", "cornerRadius": 1},
        encoding={**_grid(rows, layers), "color": colour, "tooltip": _tips()},
    )  # fmt: skip


def _heat(name: str, rows: list[str], layers: list[str]) -> Spec:
    title, _, form, scale = METRICS[name]
    colour = {"field": name, "type": "quantitative", "title": title, "scale": scale,
              "legend": {"format": form, "gradientLength": 200, "direction": "horizontal",
                         "titleLimit": 240}}  # fmt: skip
    return _chart(
        "cells", height=ROW * len(rows), mark={"type": "rect", "cornerRadius": 1},
        transform=[{"filter": f"isValid(datum.{name})"}],
        encoding={**_grid(rows, layers), "color": colour, "tooltip": _tips()},
    )  # fmt: skip


def _kinds(rows: list[str] | None = None) -> Spec:
    domain = {} if rows is None else {"sort": rows}
    return {"field": "row", "type": "nominal", "title": None, **domain,
            "scale": {"scheme": "tableau20"}}  # fmt: skip


def _picked() -> Spec:
    """A click into the legend leaves one kind alone."""
    return {"name": "kind", "select": {"type": "point", "fields": ["row"]}, "bind": "legend"}


_FADED = {"condition": {"param": "kind", "value": 1}, "value": 0.08}


def _lines(name: str, rows: list[str], numbers: list[int]) -> Spec:
    title, _, form, _ = METRICS[name]
    return _chart(
        "cells", height=280, params=[_picked()],
        mark={"type": "line", "point": {"size": 28}, "strokeWidth": 1.5},
        transform=[{"filter": f"datum.main && isValid(datum.number) && isValid(datum.{name})"}],
        encoding={
            "x": {"field": "number", "type": "quantitative", "title": "layer",
                  "axis": {"values": numbers, "format": "d", "grid": False,
                           "labelOverlap": "parity", "labelSeparation": 4},
                  "scale": {"zero": False, "nice": False, "padding": 8}},
            "y": {"field": name, "type": "quantitative", "title": title,
                  "scale": {"zero": name != "sqnr_db"}, "axis": {"format": form, "tickCount": 6}},
            "color": _kinds(rows), "opacity": _FADED, "tooltip": _tips(),
        },
    )  # fmt: skip


def _errors() -> Spec:
    return _chart(
        "errors", height=240, params=[_picked()],
        mark={"type": "line", "interpolate": "monotone", "point": {"size": 18},
              "strokeWidth": 1.5},
        encoding={
            "x": {"field": "db", "type": "quantitative", "axis": {"tickCount": 8, "grid": False},
                  "title": "error against the largest weight of its row (dB)",
                  "scale": {"zero": False, "nice": False, "padding": 8}},
            "y": {"field": "share", "type": "quantitative", "title": "share of weights",
                  "axis": {"format": "%", "tickCount": 5}},
            "color": _kinds(), "opacity": _FADED,
            "tooltip": [{"field": "row", "title": "kind"},
                        {"field": "db", "title": "error (dB)", "format": ".1f"},
                        {"field": "share", "title": "share", "format": ".2%"}],
        },
    )  # fmt: skip


def _weights() -> Spec:
    """Weights of one tensor, before as an area and after as a line."""
    x = {"field": "x", "type": "quantitative", "title": None,
         "axis": {"tickCount": 4, "format": ".1~g", "grid": False}}  # fmt: skip
    share = {"type": "quantitative", "title": None, "axis": None}
    tips = [{"field": "x", "title": "weight", "format": ".3~g"},
            {"field": "source", "title": "source", "format": ".2%"},
            {"field": "dequantized", "title": "dequantized", "format": ".2%"}]  # fmt: skip
    return {
        **_chart("bins", height=110),
        "layer": [
            {"mark": {"type": "area", "interpolate": "step", "opacity": 0.45, "color": "#72b7b2"},
             "encoding": {"x": x, "y": {"field": "source", **share}, "tooltip": tips}},
            {"mark": {"type": "line", "interpolate": "step", "strokeWidth": 1.3,
                      "color": "#e45756"},
             "encoding": {"x": x, "y": {"field": "dequantized", **share}, "tooltip": tips}},
        ],
    }  # fmt: skip
