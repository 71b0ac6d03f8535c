"""schemathesis against the OpenAPI document of a running server, for so many seconds.

    python schemathesis_run.py OPENAPI_URL SECONDS

Answers must be of a status, a type and a shape that the document allows, and never 500 or above. Prints one JSON object.
"""

import collections
import json
import re
import subprocess
import sys
import time

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
]


def main():
    url, seconds = sys.argv[1], int(sys.argv[2])
    began = time.time()
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", url, "--max-time", str(seconds), "--workers", "4",
        "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure",
        "--request-timeout", "120", "--suppress-health-check", "all", "--no-shrink", "--report", "ndjson",
        "--report-ndjson-path", "events.ndjson", "--warnings", "off",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    failures = collections.Counter()
    statuses = collections.Counter()
    with open("events.ndjson") as file:
        for line in file:
            walk(json.loads(line), failures, statuses)
    told = done.stdout[-6000:]
    print(told, file=sys.stderr)
    # What the tool itself counted, whatever the shape of its report.
    counted = re.search(r"(\d+) generated, .*?(\d+) passed", done.stdout)
    assert counted, done.stdout[-3000:] + done.stderr[-3000:]
    n_generated, n_passed = map(int, counted.groups())
    n_skipped = int((re.search(r"(\d+) skipped", done.stdout) or [0, 0])[1])
    server_errors = sum(n for status, n in statuses.items() if status >= 500)
    result = {
        "requests": sum(statuses.values()),
        "seconds": time.time() - began,
        "statuses": dict(sorted(statuses.items())),
        "server_errors": server_errors,
        "violations": max(sum(failures.values()), n_generated - n_passed - n_skipped),
        "failures": dict(failures.most_common(20)),
    }
    assert result["requests"] > 0, done.stderr[-3000:]
    print(json.dumps(result))


def walk(node, failures, statuses):
    """Finds answers and failed checks wherever the report has them."""
    if isinstance(node, dict):
        if isinstance(node.get("status_code"), int) and "headers" in node:
            statuses[node["status_code"]] += 1
        if node.get("status") == "failure" and isinstance(node.get("name"), str):
            failure = node.get("failure_info") or node.get("failure") or {}
            failures[f"{node['name']}: {json.dumps(failure)[:300]}"] += 1
        for value in node.values():
            walk(value, failures, statuses)
    elif isinstance(node, list):
        for value in node:
            walk(value, failures, statuses)


main()
