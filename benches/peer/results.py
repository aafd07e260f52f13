"""What was measured, as tables and as JSON."""

import json
import os
import statistics
import sys


class Results:
    """Rows of numbers of both sides, printed as a table and stored as JSON."""

    def __init__(self, path, about):
        self.path, self.about = path, about
        self.rows, self.failures = {}, []

    def add(self, section, name, side, value, unit="ms", better="lower", peak=None, note=None):
        """One measurement. `better` says whether "lower" or "higher" is, or "percent" of the peer's."""
        row = self.rows.setdefault((section, name), {"unit": unit, "better": better})
        entry = row.setdefault(side, {"values": [], "peaks": [], "notes": []})
        if value is not None:
            entry["values"].append(value)
        if peak is not None:
            entry["peaks"].append(peak)
        if note and note not in entry["notes"]:
            entry["notes"].append(note)

    def fail(self, section, side, error):
        """A measurement that did not work: shown at once, stored, and the run goes on."""
        self.failures.append({"section": section, "side": side, "error": str(error)})
        print(f"FAILED: {section}, {side}: {error}", file=sys.stderr, flush=True)

    def save(self):
        rows = [{"section": s, "name": n, **row} for (s, n), row in self.rows.items()]
        text = json.dumps(self.about | {"rows": rows, "failures": self.failures}, indent=1)
        # In one go, so that a reader never finds half a file.
        with open(self.path + ".new", "w") as file:
            file.write(text + "\n")
        os.replace(self.path + ".new", self.path)

    def table(self, section=None):
        """A Markdown table of a section, or of all."""
        lines = ["| what | peer | ours | ours against the peer | peak memory, peer | ours |",
                 "| --- | --- | --- | --- | --- | --- |"]
        for (of, name), row in self.rows.items():
            if section in (None, of):
                peer, ours = row.get("peer", {}), row.get("ours", {})
                cells = [name, cell(peer, row["unit"]), cell(ours, row["unit"]), against(row),
                         peak_cell(peer), peak_cell(ours)]
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def number(value):
    """Four digits that matter, with separators for thousands."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def cell(side, unit):
    values, notes = side.get("values", []), side.get("notes", [])
    text = "–"
    if values:
        text = f"{number(statistics.median(values))} {unit}"
        if len(values) > 1:
            text += f" ({number(min(values))}–{number(max(values))})"
    return text + ("" if not notes else f"; {'; '.join(notes)}")


def against(row):
    """How ours compares: by medians."""
    ours, peer = (row.get(side, {}).get("values") for side in ("ours", "peer"))
    if not ours or not peer:
        return "–"
    ours, peer = statistics.median(ours), statistics.median(peer)
    if row["better"] == "percent":
        return f"{100 * ours / peer:.0f} %"
    return f"{peer / ours if row['better'] == 'lower' else ours / peer:.2f} ×"


def peak_cell(side):
    return f"{max(side['peaks']):.1f} GiB" if side.get("peaks") else "–"
