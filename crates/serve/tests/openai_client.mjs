// The official Node client against a running server.
//
// The address, the key and the model's name come from OPENAI_BASE_URL, OPENAI_API_KEY and BANTAM_MODEL.
// Exits non-zero at the first thing that is wrong. `cargo xtask test --only clients` runs it.

import assert from "node:assert/strict";
import OpenAI from "openai";

const model = process.env.BANTAM_MODEL ?? "tiny";
const client = new OpenAI({ maxRetries: 0, timeout: 60_000 });
const messages = [
  { role: "system", content: "Name the topic." },
  { role: "user", content: "where is the card?" },
];

const checks = {
  async "the model is listed and described"() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.ok(ids.includes(model), `models are ${ids}`);
    const entry = await client.models.retrieve(model);
    assert.equal(entry.object, "model");
  },

  async "a plain completion has a message, a reason and usage"() {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 6, temperature: 0 });
    assert.equal(answer.object, "chat.completion");
    assert.match(answer.id, /^chatcmpl-/);
    const [choice] = answer.choices;
    assert.equal(choice.message.role, "assistant");
    assert.equal(typeof choice.message.content, "string");
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.ok(prompt_tokens > 0 && completion_tokens <= 6);
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
    assert.ok(answer._request_id, "x-request-id is told");
  },

  async "a stream spells the same answer and ends with usage"() {
    const body = { model, messages, max_tokens: 12, temperature: 0 };
    const plain = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let reason = null;
    let usage = null;
    for await (const chunk of stream) {
      assert.equal(chunk.object, "chat.completion.chunk");
      for (const choice of chunk.choices) {
        text += choice.delta.content ?? "";
        reason = choice.finish_reason ?? reason;
      }
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, plain.choices[0].message.content);
    assert.equal(reason, plain.choices[0].finish_reason);
    assert.equal(usage.total_tokens, plain.usage.total_tokens);
  },

  async "a seed repeats a sampled answer"() {
    const body = { model, messages, max_tokens: 8, temperature: 1, seed: 7 };
    const once = await client.chat.completions.create(body);
    const again = await client.chat.completions.create(body);
    assert.equal(once.choices[0].message.content, again.choices[0].message.content);
  },

  async "a broken-off stream leaves the server well"() {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 200, stream: true });
    for await (const _ of stream) break;
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 1 });
    assert.equal(answer.usage.completion_tokens, 1);
  },

  async "eight at once are all answered"() {
    const ask = () => client.chat.completions.create({ model, messages, max_tokens: 5, temperature: 0 });
    const answers = await Promise.all(Array.from({ length: 8 }, ask));
    assert.equal(new Set(answers.map((a) => a.choices[0].message.content)).size, 1, "the same question has one answer");
  },

  async "a tool that must be called is, with valid arguments, streamed or not"() {
    const parameters = { type: "object", properties: { n: { enum: [1, 2] } }, required: ["n"], additionalProperties: false };
    const tools = [{ type: "function", function: { name: "pick", strict: true, parameters } }];
    const body = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 120, temperature: 0 };
    const answer = await client.chat.completions.create(body);
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "pick");
    assert.ok([1, 2].includes(JSON.parse(call.function.arguments).n));
    const streamed = await client.chat.completions.stream(body).finalChatCompletion();
    assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    assert.equal(streamed.choices[0].finish_reason, "tool_calls");
  },

  async "a schema holds"() {
    const schema = { type: "object", properties: { sure: { type: "boolean" } }, required: ["sure"], additionalProperties: false };
    const response_format = { type: "json_schema", json_schema: { name: "s", strict: true, schema } };
    const answer = await client.chat.completions.create({ model, messages, response_format, max_tokens: 60 });
    assert.equal(typeof JSON.parse(answer.choices[0].message.content).sure, "boolean");
  },

  async "stored completions are listed page by page, and forgotten"() {
    const tag = `node-${process.pid}`;
    const ids = [];
    for (let n = 0; n < 3; n++) {
      const kept = await client.chat.completions.create({ model, messages, max_tokens: 2, store: true, metadata: { tag } });
      ids.push(kept.id);
    }
    const listed = [];
    for await (const one of client.chat.completions.list({ metadata: { tag }, limit: 1 })) listed.push(one.id);
    assert.deepEqual(listed, ids);
    assert.ok((await client.chat.completions.delete(ids[0])).deleted);
    await assert.rejects(client.chat.completions.retrieve(ids[0]), OpenAI.NotFoundError);
  },

  async "text goes on, and the prompt's tokens are told"() {
    const answer = await client.completions.create({ model, prompt: "where is", max_tokens: 0, echo: true, logprobs: 1 });
    assert.equal(answer.choices[0].text, "where is");
    assert.equal(answer.choices[0].logprobs.tokens.join(""), "where is");
  },

  async "responses go on from one another and stream in order"() {
    const first = await client.responses.create({ model, input: "where is the card?", max_output_tokens: 6, temperature: 0 });
    const next = await client.responses.create({ model, input: "and now?", previous_response_id: first.id, max_output_tokens: 2 });
    assert.equal(next.previous_response_id, first.id);
    const stream = await client.responses.create({ model, input: "where is the card?", max_output_tokens: 6, temperature: 0, stream: true });
    let text = "";
    let last = null;
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    assert.equal(text, first.output_text);
    assert.ok(["response.completed", "response.incomplete"].includes(last.type));
    await client.responses.delete(first.id);
    await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  },

  async "a batch answers its file"() {
    const body = { model, messages, max_tokens: 3, temperature: 0 };
    const line = (custom_id) => JSON.stringify({ custom_id, method: "POST", url: "/v1/chat/completions", body });
    const data = new File([["a", "b"].map(line).join("\n")], "in.jsonl");
    const file = await client.files.create({ file: data, purpose: "batch" });
    let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
    for (let n = 0; n < 600 && !batch.output_file_id; n++) {
      await new Promise((done) => setTimeout(done, 100));
      batch = await client.batches.retrieve(batch.id);
    }
    const output = await (await client.files.content(batch.output_file_id)).text();
    const ids = output.trim().split("\n").map((l) => JSON.parse(l).custom_id);
    assert.deepEqual(ids, ["a", "b"]);
  },

  async "an unknown model is a 404"() {
    const call = client.chat.completions.create({ model: "no-such-model", messages });
    await assert.rejects(call, (e) => e instanceof OpenAI.NotFoundError && e.message.includes("no-such-model"));
  },

  async "an unknown field is a 400 that names it"() {
    const call = client.chat.completions.create({ model, messages, temprature: 0 });
    await assert.rejects(call, (e) => {
      assert.ok(e instanceof OpenAI.BadRequestError, String(e));
      assert.ok(e.message.includes("temprature"), e.message);
      assert.ok(e.requestID, "x-request-id is told");
      return true;
    });
  },

  async "a prompt past the context is a 400, not cut short"() {
    const long = [{ role: "user", content: "card ".repeat(2000) }];
    await assert.rejects(client.chat.completions.create({ model, messages: long }), OpenAI.BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok: ${name}`);
}
