"""Answers test rows with llama.cpp's server, greedily.

    llama_rows.py --gguf FILE --rows FILE --out FILE [--system TEXT]

Rows are {"messages": [...]} (the last turn is the reference), {"prompt", "completion"} or {"text", "label"}. OUT gets
{"answer", "reference"} a line, in the rows' order. The server renders the template that the GGUF carries. Prints one JSON line.
"""
import argparse
import concurrent.futures as futures
import glob
import json
import os
import socket
import subprocess
import time
import urllib.request

a = argparse.ArgumentParser()
a.add_argument("--gguf", required=True)
a.add_argument("--rows", required=True)
a.add_argument("--out", required=True)
a.add_argument("--system")
a.add_argument("--limit", type=int)
a.add_argument("--max-tokens", type=int, default=256)
a.add_argument("--threads", type=int, default=2)
a.add_argument("--streams", type=int, default=4)
a = a.parse_args()

home = os.environ.get("BANTAM_PEERS", os.path.expanduser("~/.cache/bantam-peers"))
runnable = lambda p: os.access(p, os.X_OK) and os.path.isfile(p)
binary = os.environ.get("LLAMA_SERVER") or next(filter(runnable, glob.glob(home + "/venv/**/llama-server*", recursive=True)))
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
server = subprocess.Popen([binary, "-m", a.gguf, "-t", str(a.threads), "-tb", str(a.threads), "-np", str(a.streams), "--jinja",
                           "-c", str(a.streams * 2048), "--host", "127.0.0.1", "--port", str(port)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def turns(row):
    """(messages of the prompt, reference)"""
    if "messages" in row:
        before, reference = row["messages"][:-1], row["messages"][-1]["content"]
    elif "prompt" in row:
        before, reference = [{"role": "user", "content": row["prompt"]}], row["completion"]
    else:
        before, reference = [{"role": "user", "content": row["text"]}], row["label"]
    if a.system and before[0]["role"] != "system":
        before = [{"role": "system", "content": a.system}] + before
    return before, reference


def ask(row):
    body = {"messages": turns(row)[0], "max_tokens": a.max_tokens, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=600))["choices"][0]["message"]["content"]


try:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"llama-server stopped: it does not load {a.gguf}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except OSError:
            time.sleep(0.1)
    rows = [json.loads(line) for line in open(a.rows)][:a.limit]
    began = time.time()
    with futures.ThreadPoolExecutor(a.streams) as pool:
        answers = list(pool.map(ask, rows))
    with open(a.out, "w") as out:
        for row, answer in zip(rows, answers):
            out.write(json.dumps({"answer": answer, "reference": turns(row)[1]}, ensure_ascii=False) + "\n")
    print(json.dumps({"rows": len(rows), "seconds": round(time.time() - began, 1)}))
finally:
    server.terminate()
    server.wait()
