"""What every folder of a serving engine holds beside its own files: a README and a load test.

    README.md   what it is, steps, a first request, the load test and what the plan promises, what
                was assumed
    bench.sh    `vllm bench serve` against the engine's OpenAI door, with the plan's workload:
                random prompts of its input length, of which the share found in the prefix cache is
                one prefix common to all, and a fixed number of output tokens

Flags of the load test are those of `search/data/vllm_flags.toml`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from shardplan.search.emit.common import Raw, command_line, model_name, predicted, table
from shardplan.search.plan import Plan

__all__ = ["Page", "ahead_words", "bench", "page"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The words of a README that differ by target."""

    title: str
    about: Sequence[str]
    """Sentences of the first paragraph, or lines of a list."""
    steps: Sequence[str]
    url: str
    """Where requests go: scheme, host and port."""
    load: str
    """How the load test is started, one sentence."""
    assumed: Sequence[str]
    chat: bool = False
    """Whether the engine's door is the chat one."""


def page(plan: Plan, told: Page) -> str:
    """README.md of a deployment."""
    lines = [
        f"# {told.title}",
        "",
        *told.about,
        "",
        "## Steps",
        "",
        *(f"{number}. {step}" for number, step in enumerate(told.steps, start=1)),
        "",
        "## A first request",
        "",
        "```bash",
        *_first_request(plan, told),
        "```",
        "",
        "## Load test",
        "",
        f"{told.load} The plan promises:",
        "",
        *predicted(plan),
        "",
        "## Assumed",
        "",
        *told.assumed,
        "- Not run on a device by the tool that wrote this.",
    ]
    return "\n".join(lines) + "\n"


def _first_request(plan: Plan, told: Page) -> list[str]:
    text = "The capital of France is"
    asked = {"messages": [{"role": "user", "content": text}]} if told.chat else {"prompt": text}
    body = {"model": model_name(plan), **asked, "max_tokens": 16}
    return [
        f"curl -sS {told.url}{_door(told.chat)} \\",
        "  -H 'Content-Type: application/json' \\",
        f"  -d '{json.dumps(body)}'",
    ]


def _door(chat: bool) -> str:
    return "/v1/chat/completions" if chat else "/v1/completions"


def bench(
    plan: Plan, shell: Sequence[str], *, url: str = "", servers: int = 1, chat: bool = False
) -> str:
    """The load test script. `shell`: lines that set MODEL; `url`: default of BASE_URL.

    Without `url`, BASE_URL must name what stands before the `servers`.
    """
    work = plan.request.workload
    slots = work.concurrency or max(1, round(plan.performance.concurrency))
    facts = table("vllm_ascend")["bench"]
    prompts = max(facts["fewest_prompts"], facts["prompts_per_slot"] * slots)
    shared = round(work.input_len * work.prefix_hit)
    flags: list[tuple[str, str | None]] = [
        ("--backend", "openai-chat" if chat else "openai"),
        ("--base-url", Raw('"$BASE_URL"')),
        ("--endpoint", _door(chat)),
        ("--model", Raw('"$MODEL"')),
        ("--served-model-name", model_name(plan)),
        ("--dataset-name", "random"),
        ("--random-input-len", str(work.input_len - shared)),
        ("--random-prefix-len", str(shared)),
        ("--random-output-len", str(work.output_len)),
        ("--num-prompts", str(prompts)),
        ("--max-concurrency", str(slots)),
        ("--ignore-eos", None),
    ]
    if work.request_rate is not None:
        flags.append(("--request-rate", f"{work.request_rate:g}"))
    need = f"set BASE_URL to the balancer before the {servers} servers"
    lines = [
        "#!/usr/bin/env bash",
        "# Sends the plan's workload to the running deployment and prints what it measured.",
        "set -euo pipefail",
        *shell,
        f'BASE_URL="${{BASE_URL:-{url}}}"' if url else f': "${{BASE_URL:?{need}}}"',
        "",
        "exec "
        + command_line("vllm_flags", "bench", ["vllm", "bench", "serve"], flags)
        + ' \\\n  "$@"',
    ]
    return "\n".join(lines) + "\n"


def ahead_words(plan: Plan) -> list[str]:
    """What is assumed of tokens that are predicted ahead; nothing where none are."""
    way = plan.strategy
    if not way.mtp:
        return []
    share = plan.request.workload.mtp_acceptance
    kept = "" if share is None else f"; the plan assumed that {share:.0%} of drafts are kept"
    return [
        f"- The checkpoint holds the model's prediction layer, which drafts {way.mtp} token(s) "
        f"a step{kept}. Random prompts may be predicted less well: measure with real ones."
    ]
