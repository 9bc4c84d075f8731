"""One prompt under β = -1, 0 and +1 from one running vLLM server.

    actscale-fast demo                                  # learns scalars and saves them in ./actscale-demo
    python examples/serve_with_vllm.py                  # in an environment with vLLM

Saves the demo model as a plain checkpoint, starts vLLM's API server on it with a folder that holds the scalars under
the name "capitals", and sends the same prompt with three strengths at once, through the OpenAI client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai

import actscale_fast as af

PROMPT = "The capital of {0} is {1}. Q: What is the capital of {0}? A: The capital of {0} is"
CLAIMS = (("Tunisia", "Bern"), ("Greece", "Kabul"))
STRENGTHS = (-1.0, 0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--intervention", type=Path, default=Path("actscale-demo"), help="what `actscale-fast demo` saved"
    )
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is ended too
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model, tokenizer = af.load_demo_model()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        af.load_intervention(options.intervention).save_pretrained(folder / "interventions" / "capitals")
        with serving(folder / "model", folder / "interventions", options.port) as url:
            asyncio.run(show(url))


@contextlib.contextmanager
def serving(model: Path, interventions: Path, port: int) -> Iterator[str]:
    """Run vLLM's API server until the block ends; its output goes to server.log."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "512", "--port", str(port)]
    command += ["--enforce-eager"]  # starts without a compilation; a server that runs for long is better off with it
    environment = os.environ | {"ACTSCALE_INTERVENTIONS": str(interventions), "VLLM_PLUGINS": "actscale"}
    log = Path("server.log")
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with exit status {server.returncode}; see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"the server did not start in five minutes; see {log}")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


async def show(url: str) -> None:
    """Print what the server says to each prompt under each strength; all requests are sent at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(prompt: str, strength: float) -> str:
            found = await client.completions.create(
                model="demo",
                prompt=prompt,
                max_tokens=10,
                temperature=0,
                extra_body={"vllm_xargs": {"actscale": "capitals", "actscale_strength": strength}},
            )
            return found.choices[0].text

        prompts = [PROMPT.format(country, claim) for country, claim in CLAIMS]
        texts = await asyncio.gather(*(ask(prompt, strength) for prompt in prompts for strength in STRENGTHS))
    answers = iter(texts)
    for prompt in prompts:
        print(f"\n{prompt}")
        for strength in STRENGTHS:
            print(f"  β = {strength:+g}  {next(answers)!r}")


if __name__ == "__main__":
    main()
