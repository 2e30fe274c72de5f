"""Each event of a run as a line of words, the same in the live view and in a log."""

from __future__ import annotations

import itertools
from typing import Any

from stackwise.report import words

Event = dict[str, Any]
PHASES = {"reading": "reading text", "tokenizer": "training the tokenizer", "waiting": "waiting for another process"}
"""What is prepared before there is a plan, where its name does not say it."""


def wording(event: Event) -> str | None:
    """What an event says, without its stage; None for those that are shown as progress alone."""
    match event["event"]:
        case "note":
            return f"note: {event['text']}"
        case "data":
            return _data(event)
        case "device":
            memory = f", {words.size(event['memory'])} of memory" if event.get("memory") else ""
            return f"device: {event['device']} ({event['name']}{memory}), {event.get('precision', 'fp32')}"
        case "plan":
            return "\n".join(_decisions(event["stages"]))
        case "fit":
            disk = f"{words.size(event['disk_needed'])} of disk, {words.size(event['disk_free'])} are free"
            memory = (
                f"about {words.size(event['memory_needed'])} of memory, there are {words.size(event['memory_total'])}"
            )
            return f"it fits: needs {disk}; {memory}{_traffic(event)}"
        case "training":
            return f"training, {words.plural(event['steps'], 'step')} ({event['reason']})"
        case "resumed":
            return f"resumed at step {event['step']:,} of {event['steps']:,}"
        case "committed":
            return "committed"
        case "writing":
            chunks = event.get("chunks")
            return "writing its boundary" + (f", {words.plural(chunks, 'chunk')}" if chunks else "")
        case "filling":
            chunks = words.plural(event["chunks"], "chunk")
            return (
                f"its boundary is written while stage {event.get('above', event['stage'] + 1)} trains on it, {chunks}"
            )
        case "written":
            speed = event["bytes"] / event["seconds"] if event["seconds"] else 0.0
            took = f"{words.size(event['bytes'])} in {words.duration(event['seconds'])}, {words.size(speed)}/s"
            waited = [
                f"{words.percent(event[key])} waiting for {what}"
                for key, what in (("wait_fraction", "data"), ("blocked_fraction", "the disk"))
                if event.get(key, 0.0) >= 0.005
            ]
            return f"boundary written: {', '.join([took, *waited])}"
        case "reused":
            return f"reused ({event['reason']})"
        case "probe":
            return f"{_blocks(event)} unfrozen: held-out loss {event['nats']:.4f}{_gained(event)}"
        case "unfrozen":
            return f"{_blocks(event)}, which gained most, now trained"
        case "fused":
            kept = "" if event["gain"] > 0 else ": the weights stay as they were"
            trained = f"{_blocks(event)} trained"
            return f"{trained}: held-out loss {event['nats']:.4f}{_gained(event)}{kept}"
        case "recomputing" | "stopping" | "failed":
            return str(event["text"])
        case "dropped":
            why = event.get("why", "store.keep")
            return f"boundary {event['stage']} dropped, {words.size(event['bytes'])} freed ({why})"
        case "pruned":
            return f"weights of an earlier window dropped, {words.size(event['bytes'])} freed"
        case "warning":
            return f"warning: {event['text']}"
        case "evaluation" if event.get("reused"):
            return "evaluation: reused (the weights are the same)"
        case "exported":
            return f"exported to {event.get('path') or event.get('directory')}"
        case "interrupted":
            return f"interrupted: {event['text']}"
        case "done":
            return f"done in {words.duration(event['seconds'])}"
    return None


def _blocks(event: Event) -> str:
    first, last = event["blocks"]
    return f"block{'s' if last > first else ''} {words.span(first, last)}"


def _gained(event: Event) -> str:
    return f", {event['gain']:.4f} less than before" if event["gain"] > 0 else ", no gain"


def _traffic(event: Event) -> str:
    """What the boundaries cost where they are not each written by a pass of their own, beside what those would."""
    here, separate = event.get("traffic"), event.get("separate")
    if not here or not separate or here == separate:
        return ""

    def figures(of: dict[str, int]) -> str:
        return (
            f"{words.size(of['read'])} read, {words.size(of['written'])} written, "
            f"{of['flops'] / 1e12:.3g} TFLOP of forward passes"
        )

    return f"; boundaries: {figures(here)} (with each stored by a pass of its own: {figures(separate)})"


def step_line(event: Event, seconds_left: float | None) -> str:
    """A step's figures in a line."""
    parts = [
        f"step {event['step']:,}/{event['steps']:,}",
        f"loss {event['loss']:.3f}",
        f"lr {words.rate(event['learning_rate'])}",
        f"{words.count(event['tokens_per_second'])} tokens/s",
        f"wait {words.percent(event['wait_fraction'])}",
        f"memory {words.size(event['memory'])}",
    ]
    if seconds_left is not None and event["step"] < event["steps"]:
        parts.append(f"{words.clock(seconds_left)} left")
    return "  ".join(parts)


def _data(event: Event) -> str:
    splits = f"{words.plural(event['documents'], 'document')}, {words.count(event['tokens'])} tokens"
    if event.get("bytes"):
        splits += f", {words.size(event['bytes'])}"
    how = "reused, unchanged" if event["reused"] else f"prepared in {words.duration(event['seconds'])}"
    return f"data: {how}: {splits} ({event['directory']})"


def _decisions(stages: list[dict[str, Any]]) -> list[str]:
    """Reuse or train, and why; neighbours that agree share a line."""

    def alike(stage: dict[str, Any]) -> tuple[Any, ...]:
        return stage.get("window", 0), stage["action"], stage["reason"], stage["steps"]

    spans = []
    for (window, action, reason, steps), group in itertools.groupby(stages, alike):
        depths = [stage["depth"] for stage in group]
        which = f"stage{'s' if len(depths) > 1 else ''} {words.span(depths[0], depths[-1])}"
        doing = "reuse" if action == "reuse" else f"train, {words.plural(steps, 'step')}"
        spans.append((which, f"{doing} ({reason})", window))
    several, lines = any(stage.get("window", 0) for stage in stages), []
    for (which, doing), same in itertools.groupby(spans, lambda span: span[:2]):
        windows = [window for *_, window in same]
        when = f", window{'s' if len(windows) > 1 else ''} {words.span(windows[0], windows[-1])}" if several else ""
        lines.append(f"{which}{when}: {doing}")
    return lines
