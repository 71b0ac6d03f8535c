//! promptfoo's configuration: prompts, providers, tests with assertions.
//!
//! An assertion becomes a grader, its value a field `expect_N` of the row; tests with the same kinds of assertions are one
//! eval. What promptfoo reckons with weights and thresholds of a test is not taken over: each grader passes or fails.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use super::{Found, Imported, Models, RowSet, item, schema};

/// Reads a configuration that lies in a folder.
pub(super) fn read(config: &Value, folder: &Path, models: &Models) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let prompts = prompts(config, folder, &mut found)?;
    let runs = runs(config, &prompts, models, &mut found);
    let default = &config["defaultTest"];
    let name = config["description"].as_str().unwrap_or("promptfoo");
    let known = [
        "description",
        "prompts",
        "providers",
        "targets",
        "tests",
        "defaultTest",
    ];
    for key in config.as_object().into_iter().flatten().map(|(key, _)| key) {
        if !known.contains(&key.as_str()) && !key.starts_with('$') {
            found.notes.push(format!("`{key}` is not taken over"));
        }
    }
    let tests = tests(&config["tests"], folder)?;
    if tests.is_empty() {
        bail!("there are no tests in it");
    }
    for (i, test) in tests.iter().enumerate() {
        let place = format!("tests[{i}]");
        let mut vars = object(&default["vars"]);
        vars.extend(object(&test["vars"]));
        if let Some((key, _)) = vars.iter().find(|(_, value)| value.is_array()) {
            found
                .unsupported
                .push(format!("{place}.vars.{key}: a list of values for one test"));
            continue;
        }
        for key in ["threshold", "options", "provider", "assertScoringFunction"] {
            if !test[key].is_null() {
                found.notes.push(format!("{place}.{key} is not taken over"));
            }
        }
        let asserts = [&default["assert"], &test["assert"]];
        let asserts = asserts.into_iter().filter_map(Value::as_array).flatten();
        let mut row = vars.clone();
        let mut criteria = Vec::new();
        for (k, assert) in asserts.enumerate() {
            match grader(k, assert, &vars, models) {
                Ok((criterion, expected)) => {
                    if let Some(expected) = expected {
                        row.insert(format!("expect_{k}"), expected);
                    }
                    criteria.push(criterion);
                }
                Err(why) => found
                    .unsupported
                    .push(format!("{place}.assert[{k}]: {why}")),
            }
        }
        if criteria.is_empty() {
            found.notes.push(format!(
                "{place} has no assertion that can be checked, and is left out"
            ));
            continue;
        }
        add(&mut found, name, criteria, row, &runs);
    }
    Ok(found)
}

/// Puts a row into the eval of its kinds of assertions.
fn add(
    found: &mut Found,
    name: &str,
    criteria: Vec<Value>,
    row: Map<String, Value>,
    runs: &[(String, Value)],
) {
    let criteria = json!(criteria);
    let known = found
        .evals
        .iter_mut()
        .find(|eval| eval.eval["testing_criteria"] == criteria);
    let line = json!({"item": row});
    match known {
        Some(eval) => {
            let properties = &mut eval.eval["data_source_config"]["item_schema"]["properties"];
            for key in row.keys() {
                properties[key] = json!({});
            }
            eval.sets[0].rows.push(line);
        }
        None => {
            let n = found.evals.len();
            let name = if n == 0 {
                name.to_owned()
            } else {
                format!("{name} ({})", n + 1)
            };
            found.evals.push(Imported {
                eval: json!({
                    "name": name, "testing_criteria": criteria,
                    "data_source_config": {"type": "custom", "item_schema": schema(&row), "include_sample_schema": true},
                }),
                sets: vec![RowSet {
                    name,
                    rows: vec![line],
                    runs: runs.to_vec(),
                }],
            });
        }
    }
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// The tests, wherever they stand.
fn tests(value: &Value, folder: &Path) -> anyhow::Result<Vec<Value>> {
    match value {
        Value::Array(tests) => {
            let mut all = Vec::new();
            for test in tests {
                match test {
                    Value::String(_) => all.extend(self::tests(test, folder)?),
                    test => all.push(test.clone()),
                }
            }
            Ok(all)
        }
        Value::String(place) => {
            let path = folder.join(place.trim_start_matches("file://"));
            let text = fs_err::read_to_string(&path)?;
            let read = match path.extension().and_then(|ending| ending.to_str()) {
                Some("jsonl") => text
                    .lines()
                    .filter(|line| !line.trim().is_empty())
                    .map(|line| serde_json::from_str(line).map_err(anyhow::Error::from))
                    .collect::<anyhow::Result<Vec<Value>>>(),
                Some("yaml" | "yml" | "json") => {
                    serde_yaml_ng::from_str(&text).map_err(anyhow::Error::from)
                }
                _ => bail!("{place}: tests are read from .yaml, .json and .jsonl files"),
            };
            read.with_context(|| path.display().to_string())
        }
        _ => Ok(Vec::new()),
    }
}

/// The prompts as messages with places for the row's fields.
fn prompts(config: &Value, folder: &Path, found: &mut Found) -> anyhow::Result<Vec<Value>> {
    let all = match &config["prompts"] {
        Value::Array(all) => all.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let mut prompts = Vec::new();
    for (i, prompt) in all.iter().enumerate() {
        let text = prompt
            .as_str()
            .or(prompt["raw"].as_str())
            .map(str::to_owned);
        let text = match text
            .as_deref()
            .and_then(|text| text.strip_prefix("file://"))
        {
            Some(file) => Some(fs_err::read_to_string(folder.join(file))?),
            None => text,
        };
        let Some(text) = text else {
            found
                .unsupported
                .push(format!("prompts[{i}]: only texts and files of texts"));
            continue;
        };
        match messages(&text) {
            Ok(messages) => prompts.push(messages),
            Err(why) => found.unsupported.push(format!("prompts[{i}]: {why}")),
        }
    }
    Ok(prompts)
}

/// A prompt is a conversation as JSON or YAML, or one message of the user's.
fn messages(text: &str) -> Result<Value, String> {
    let parsed: Option<Vec<Value>> = serde_yaml_ng::from_str(text).ok();
    let chat = parsed.filter(|all| !all.is_empty() && all.iter().all(|m| m["role"].is_string()));
    let Some(chat) = chat else {
        return Ok(json!([{"role": "user", "content": places(text.trim_end())?}]));
    };
    let message = |message: Value| {
        let content = message["content"]
            .as_str()
            .ok_or("a message's content is no text")?;
        Ok(json!({"role": message["role"], "content": places(content)?}))
    };
    chat.into_iter().map(message).collect()
}

/// `{{ x }}` as `{{ item.x }}`; anything else of nunjucks is refused.
fn places(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    if text.contains("{%") || text.contains("{#") {
        return Err("blocks of nunjucks are not known here".to_owned());
    }
    while let Some(open) = rest.find("{{") {
        let (before, after) = rest.split_at(open);
        let (inside, after) = after[2..].split_once("}}").ok_or("`{{` without `}}`")?;
        let name = inside.trim().trim_matches('-').trim();
        let is_name = name
            .chars()
            .all(|c| c.is_alphanumeric() || "_-.".contains(c));
        if name.is_empty() || !is_name || name.starts_with("env.") {
            return Err(format!(
                "`{{{{{inside}}}}}` is more than the name of a variable"
            ));
        }
        let (first, more) = name
            .split_once('.')
            .map_or((name, String::new()), |(first, more)| {
                (first, format!(".{more}"))
            });
        out.push_str(before);
        out.push_str(&format!("{{{{ {}{more} }}}}", item(first)));
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// A run for each prompt and provider.
fn runs(
    config: &Value,
    prompts: &[Value],
    models: &Models,
    found: &mut Found,
) -> Vec<(String, Value)> {
    let listed = match (&config["providers"], &config["targets"]) {
        (Value::Null, Value::Array(all)) | (Value::Array(all), _) => all.clone(),
        (Value::String(one), _) => vec![json!(one)],
        _ => Vec::new(),
    };
    let mut asked: Vec<(String, Value)> = Vec::new();
    if let Some(model) = &models.judged {
        asked.push((model.clone(), json!({})));
    } else {
        for (i, provider) in listed.iter().enumerate() {
            let id = provider
                .as_str()
                .or(provider["id"].as_str())
                .unwrap_or_default();
            match id.split(':').collect::<Vec<_>>().as_slice() {
                ["openai", "chat" | "responses", model @ ..] | ["openai", model @ ..]
                    if !model.is_empty() =>
                {
                    asked.push((model.join(":"), sampling(i, &provider["config"], found)));
                }
                _ => found.unsupported.push(format!(
                    "providers[{i}]: `{id}` is not a provider of chat answers; --model says who is judged"
                )),
            }
        }
    }
    let mut runs = Vec::new();
    for (model, sampling) in &asked {
        for (i, messages) in prompts.iter().enumerate() {
            let name = if prompts.len() == 1 {
                model.clone()
            } else {
                format!("{model}, prompt {}", i + 1)
            };
            let mut source = json!({
                "type": "completions", "model": model,
                "input_messages": {"type": "template", "template": messages},
            });
            if sampling.as_object().is_some_and(|map| !map.is_empty()) {
                source["sampling_params"] = sampling.clone();
            }
            runs.push((name, source));
        }
    }
    runs
}

fn sampling(i: usize, config: &Value, found: &mut Found) -> Value {
    let mut params = json!({});
    for (name, value) in config.as_object().into_iter().flatten() {
        match name.as_str() {
            "temperature" | "top_p" | "seed" | "response_format" | "tools" => {
                params[name] = value.clone();
            }
            "max_tokens" | "max_completion_tokens" => {
                params["max_completion_tokens"] = value.clone();
            }
            _ => found
                .notes
                .push(format!("providers[{i}].config.{name} is not taken over")),
        }
    }
    params
}

type Graded = (Value, Option<Value>);

/// An assertion as a grader, and the value that its row expects.
fn grader(
    k: usize,
    assert: &Value,
    vars: &Map<String, Value>,
    models: &Models,
) -> Result<Graded, String> {
    let whole = assert["type"].as_str().ok_or("an assertion has a `type`")?;
    let (kind, is_not) = match whole.strip_prefix("not-") {
        Some(kind) => (kind, true),
        None => (whole, false),
    };
    let name = match assert["metric"].as_str() {
        Some(metric) => format!("{metric} {}", k + 1),
        None => format!("{whole} {}", k + 1),
    };
    let value = filled(&assert["value"], vars)?;
    let wanted = || -> Result<Value, String> {
        match &value {
            Value::Null => Err(format!("`{whole}` needs a `value`")),
            Value::String(text) if text.starts_with("file://") => {
                Err("values in files are not read".to_owned())
            }
            value => Ok(value.clone()),
        }
    };
    let place = format!("{{{{ item.expect_{k} }}}}");
    let answer = "{{ sample.output_text }}";
    let check = |operation: &str| json!({"type": "string_check", "name": name, "input": answer, "reference": place, "operation": operation});
    let near = |metric: &str, threshold: f64| {
        let threshold = assert["threshold"].as_f64().unwrap_or(threshold);
        json!({"type": "text_similarity", "name": name, "input": answer, "reference": place,
            "evaluation_metric": metric, "pass_threshold": threshold})
    };
    let program = |test: &str| {
        let not = if is_not { "not " } else { "" };
        let source = format!(
            "import json, re\n\n\ndef grade(sample, item):\n    output = sample[\"output_text\"]\n    value = item.get(\"expect_{k}\")\n    return float({not}({test}))\n"
        );
        json!({"type": "python", "name": name, "source": source, "pass_threshold": 1})
    };
    let listed = |value: Value| match value {
        Value::String(text) => json!(text.split(',').map(str::trim).collect::<Vec<_>>()),
        value => value,
    };
    let criterion = match kind {
        "equals" => match wanted()? {
            Value::Object(_) | Value::Array(_) => {
                return Ok((program("json.loads(output) == value"), Some(wanted()?)));
            }
            _ => check(if is_not { "ne" } else { "eq" }),
        },
        "contains" => negated(check("like"), is_not, 0.5),
        "icontains" => negated(check("ilike"), is_not, 0.5),
        "contains-all" => {
            return Ok((
                program("all(part in output for part in value)"),
                Some(listed(wanted()?)),
            ));
        }
        "contains-any" => {
            return Ok((
                program("any(part in output for part in value)"),
                Some(listed(wanted()?)),
            ));
        }
        "icontains-all" => {
            let test = "all(part.lower() in output.lower() for part in value)";
            return Ok((program(test), Some(listed(wanted()?))));
        }
        "icontains-any" => {
            let test = "any(part.lower() in output.lower() for part in value)";
            return Ok((program(test), Some(listed(wanted()?))));
        }
        "starts-with" => program("output.startswith(value)"),
        "regex" => program("re.search(value, output) is not None"),
        "is-json" if value.is_null() => {
            return Ok((program("\"output_json\" in sample"), None));
        }
        "python" => {
            let code = wanted()?;
            let code = code.as_str().ok_or("a `python` assertion is a text")?;
            if is_not {
                return Err("`not-python` is not known here".to_owned());
            }
            return Ok((python(&name, code, assert), None));
        }
        "similar" => negated(near("cosine", 0.75), is_not, 0.75),
        "rouge-n" => negated(near("rouge_1", 0.75), is_not, 0.75),
        "bleu" => negated(near("bleu", 0.5), is_not, 0.5),
        "gleu" => negated(near("gleu", 0.5), is_not, 0.5),
        "meteor" => negated(near("meteor", 0.5), is_not, 0.5),
        "llm-rubric" => {
            let model = models.judge.as_deref();
            let model = model.ok_or("`llm-rubric` needs a judging model; --judge names it")?;
            let question =
                format!("Does the answer meet the rule?\n\nRule:\n{place}\n\nAnswer:\n{answer}");
            let passing = if is_not { "no" } else { "yes" };
            json!({"type": "label_model", "name": name, "model": model, "labels": ["yes", "no"],
                "passing_labels": [passing], "input": [{"role": "user", "content": question}]})
        }
        _ => return Err(format!("`{whole}` is not known here")),
    };
    let expected = match wanted()? {
        Value::String(text) => json!(text),
        other => json!(other.to_string()),
    };
    Ok((criterion, Some(expected)))
}

/// The opposite of a grader.
fn negated(grader: Value, is_not: bool, threshold: f64) -> Value {
    if !is_not {
        return grader;
    }
    let threshold = grader["pass_threshold"].as_f64().unwrap_or(threshold);
    json!({
        "type": "multi", "name": grader["name"], "graders": {"a": grader},
        "calculate_output": "1 - a", "pass_threshold": 1.0 - threshold,
    })
}

/// promptfoo's programs are an expression, or the body of a function of `output` and `context`.
fn python(name: &str, code: &str, assert: &Value) -> Value {
    let body = if code.contains('\n') {
        code.lines()
            .map(|line| format!("    {line}\n"))
            .collect::<String>()
    } else {
        format!("    return ({code})\n")
    };
    let source = format!(
        "import json, math, re\n\n\ndef get_assert(output, context):\n{body}\n\ndef grade(sample, item):\n    \
         result = get_assert(sample[\"output_text\"], {{\"vars\": item}})\n    \
         return float(result[\"score\"] if isinstance(result, dict) else result)\n"
    );
    let threshold = assert["threshold"].as_f64().unwrap_or(0.5);
    json!({"type": "python", "name": name, "source": source, "pass_threshold": threshold})
}

/// A value with the test's variables in their places.
fn filled(value: &Value, vars: &Map<String, Value>) -> Result<Value, String> {
    match value {
        Value::String(text) if text.contains("{{") => {
            let template = places(text)?;
            let template = bantam_judge::template::Template::parse(&template);
            let template = template.map_err(|error| error.to_string())?;
            let row = Value::Object(vars.clone());
            template
                .fill(&row, &Value::Null)
                .map(Value::String)
                .map_err(|error| error.to_string())
        }
        Value::Array(values) => values.iter().map(|value| filled(value, vars)).collect(),
        other => Ok(other.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"
description: capitals
prompts:
  - "What is the capital of {{ country }}?"
  - '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{country}}?"}]'
providers:
  - openai:gpt-4o-mini
  - id: openai:chat:gpt-4.1
    config: {temperature: 0, max_tokens: 20, organization: x}
  - exec:./run.sh
defaultTest:
  assert:
    - type: not-contains
      value: "I don't know"
tests:
  - vars: {country: France, capital: Paris}
    assert:
      - {type: icontains, value: "{{capital}}"}
  - vars: {country: Italy, capital: Rome}
    assert:
      - {type: icontains, value: "{{capital}}"}
  - vars: {country: Chad}
    assert:
      - {type: regex, value: "N.?Djamena"}
      - {type: javascript, value: "output.length < 5"}
      - {type: llm-rubric, value: is polite}
  - vars: {country: Peru}
    assert: [{type: python, value: len(output) < 20}]
"#;

    #[test]
    fn tests_become_rows_and_assertions_graders() {
        let config: Value = serde_yaml_ng::from_str(CONFIG).unwrap();
        let found = read(&config, Path::new(""), &Models::default()).unwrap();
        assert_eq!(found.evals.len(), 3);
        let first = &found.evals[0];
        assert_eq!(first.eval["name"], "capitals");
        assert_eq!(
            first.sets[0].rows[1],
            json!({"item": {"country": "Italy", "capital": "Rome", "expect_0": "I don't know", "expect_1": "Rome"}})
        );
        let criteria = &first.eval["testing_criteria"];
        assert_eq!(criteria[0]["calculate_output"], "1 - a");
        assert_eq!(criteria[1]["operation"], "ilike");
        assert_eq!(first.sets[0].runs.len(), 4);
        let (name, source) = &first.sets[0].runs[3];
        assert_eq!(name, "gpt-4.1, prompt 2");
        assert_eq!(
            source["sampling_params"],
            json!({"temperature": 0, "max_completion_tokens": 20})
        );
        assert_eq!(
            source["input_messages"]["template"][1]["content"],
            "{{ item.country }}?"
        );
        let told = found.unsupported.join("\n");
        for want in [
            "providers[2]: `exec:./run.sh`",
            "tests[2].assert[2]: `javascript`",
            "tests[2].assert[3]: `llm-rubric` needs a judging model",
        ] {
            assert!(told.contains(want), "{want}: {told}");
        }
        assert!(found.notes.iter().any(|note| note.contains("organization")));
        assert!(
            found.evals[2].eval["testing_criteria"][1]["source"]
                .as_str()
                .unwrap()
                .contains("return (len(output) < 20)")
        );
    }

    #[test]
    fn more_than_names_is_refused() {
        for text in [
            "{{ a | upper }}",
            "{% if a %}",
            "{{ env.KEY }}",
            "{{ a",
            "{{ }}",
        ] {
            assert!(places(text).is_err(), "{text}");
        }
        assert_eq!(
            places("{{a.b}} {{ my-var }}").unwrap(),
            "{{ item.a.b }} {{ item[\"my-var\"] }}"
        );
    }
}
