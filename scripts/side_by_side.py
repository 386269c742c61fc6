#!/usr/bin/env python3
"""Asks every model the same questions at the same time and prints the answers side by side.

side_by_side.py [--receipts FILE] OPENLORA ALIAS [ALIAS …]   (an empty alias is the base model)

FILE gets a line for each answer: its receipt and its alias.
"""

import argparse
import concurrent.futures
import json
import shutil
import subprocess
import sys
import textwrap
import time

QUESTIONS = ["What is CWE-79?", 'Define the noun "river".', "Explain why the sky is blue in one sentence."]


def ask(openlora, alias, question):
    """One answer, with the seconds it took."""
    began = time.monotonic()
    command = [openlora, "generate", "--json", "--temperature", "0", "--max-tokens", "48", "--adapter", alias, question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout), time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description="Asks every model the same questions at the same time.")
    parser.add_argument("--receipts", type=argparse.FileType("w"))
    parser.add_argument("openlora")
    parser.add_argument("aliases", nargs="+")
    options = parser.parse_args()
    openlora, aliases = options.openlora, options.aliases
    width = max(24, (min(shutil.get_terminal_size((120, 24)).columns, 160) - 3 * len(aliases)) // len(aliases))
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(QUESTIONS) * len(aliases)) as pool:
        asked = {(q, a): pool.submit(ask, openlora, a, q) for q in QUESTIONS for a in aliases}
        answers = {pair: future.result() for pair, future in asked.items()}
    seconds = time.monotonic() - began
    if options.receipts:
        for (_, alias), (answer, _) in answers.items():
            print(answer["receipt_id"], alias, file=options.receipts)
        options.receipts.close()
    for question in QUESTIONS:
        print(f"\n{question}")
        columns = []
        for alias in aliases:
            answer, took = answers[question, alias]
            tokens = answer["usage"]["completion_tokens"]
            head = f"[{alias or 'base model'}] {tokens} tokens, {tokens / took:.0f} tok/s"
            columns.append([head, *textwrap.wrap(" ".join(answer["text"].split()), width)])
        for row in range(max(map(len, columns))):
            print("   ".join(f"{column[row] if row < len(column) else '':{width}}" for column in columns).rstrip())
    tokens = sum(answer["usage"]["completion_tokens"] for answer, _ in answers.values())
    print(f"\n{len(answers)} answers at once: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s together")


if __name__ == "__main__":
    main()
