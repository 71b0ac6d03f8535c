// Evals by the official Node client: make, run on a file, read items, try a grader, delete. The address and the model are
// `OPENAI_BASE_URL` and `BANTAM_MODEL`.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const model = process.env.BANTAM_MODEL;
const client = new OpenAI({ maxRetries: 2 });

const evaluation = await client.evals.create({
  name: "labels",
  data_source_config: {
    type: "custom",
    item_schema: { type: "object", properties: { text: { type: "string" }, label: { type: "string" } } },
    include_sample_schema: true,
  },
  testing_criteria: [
    {
      type: "string_check",
      name: "label",
      input: "{{ sample.output_text }}",
      operation: "ilike",
      reference: "{{ item.label }}",
    },
  ],
});
const rows = ["rain", "cake"].map((text) => ({ item: { text, label: text } }));
const lines = rows.map((row) => JSON.stringify(row)).join("\n");
const file = await client.files.create({ file: await toFile(Buffer.from(lines), "rows.jsonl"), purpose: "evals" });
let run = await client.evals.runs.create(evaluation.id, {
  name: "first",
  data_source: {
    type: "completions",
    model,
    input_messages: { type: "template", template: [{ role: "user", content: "Name it: {{ item.text }}" }] },
    source: { type: "file_id", id: file.id },
    sampling_params: { max_completion_tokens: 8, temperature: 0 },
  },
});
while (["queued", "in_progress"].includes(run.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  run = await client.evals.runs.retrieve(run.id, { eval_id: evaluation.id });
}
assert.equal(run.status, "completed");
assert.equal(run.result_counts.total, 2);
let n = 0;
for await (const item of client.evals.runs.outputItems.list(run.id, { eval_id: evaluation.id, limit: 1 })) {
  assert.equal(item.results[0].name, "label");
  n += 1;
}
assert.equal(n, 2);
const graded = await client.fineTuning.alpha.graders.run({
  grader: { type: "string_check", name: "g", input: "{{ sample.output_text }}", reference: "yes", operation: "eq" },
  model_sample: "yes",
});
assert.equal(graded.reward, 1);
await assert.rejects(() => client.evals.retrieve("eval_none"), OpenAI.NotFoundError);
await client.evals.runs.delete(run.id, { eval_id: evaluation.id });
assert.equal((await client.evals.delete(evaluation.id)).deleted, true);
await client.files.delete(file.id);
console.log("evals in Node: done");
