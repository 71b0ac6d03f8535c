//! What an answer must look like: `response_format`, `text.format`, `guided_regex`, `guided_choice`.

use bantam_text::ConstraintSpec;
use serde_json::Value;

use super::fields::Fields;
use crate::error::ApiError;

/// A constraint, and the field it came from.
pub(crate) type Wanted = (String, ConstraintSpec);

/// Reads a format; `{"type": "text"}` constrains nothing. In the Responses API the schema's fields are `flat`.
pub(crate) fn format(mut format: Fields, flat: bool) -> Result<Option<Wanted>, ApiError> {
    let kind: Option<String> = format.take("type")?;
    let path = format.path("type");
    let wanted = match kind.as_deref() {
        Some("text") => None,
        Some("json_object") => {
            let root = path.trim_end_matches(".type").to_string();
            Some((root, ConstraintSpec::JsonObject))
        }
        Some("json_schema") if flat => Some(schema(&mut format)?),
        Some("json_schema") => {
            let Some(mut inner) = format.object("json_schema")? else {
                return Err(ApiError::missing(&format.path("json_schema")));
            };
            let wanted = schema(&mut inner)?;
            inner.finish(&[])?;
            Some(wanted)
        }
        _ => {
            let message = format!("`{path}` must be `text`, `json_object` or `json_schema`");
            return Err(ApiError::invalid(path, message));
        }
    };
    format.finish(&[])?;
    Ok(wanted)
}

/// `name`, `description`, `schema`, `strict`. A schema is always enforced, whatever `strict` says.
fn schema(fields: &mut Fields) -> Result<Wanted, ApiError> {
    let name: String = fields.need("name")?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !(1..=64).contains(&name.len()) || !name.chars().all(is_plain) {
        let param = fields.path("name");
        let message = format!("`{param}` must have 1 to 64 letters, digits, `_` and `-`");
        return Err(ApiError::invalid(param, message));
    }
    let _: Option<String> = fields.take("description")?;
    let _: Option<bool> = fields.take("strict")?;
    let schema: Option<Value> = fields.take("schema")?;
    // Without a schema the format says no more than "a JSON object".
    let spec = schema.map_or(ConstraintSpec::JsonObject, ConstraintSpec::JsonSchema);
    Ok((fields.path("schema"), spec))
}

/// The one constraint that a request asks for, if any.
pub(crate) fn constraint(fields: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    let wanted = match fields.object("response_format")? {
        Some(found) => format(found, false)?,
        None => None,
    };
    let regex: Option<String> = fields.take("guided_regex")?;
    let regex = regex.map(|r| ("guided_regex".to_string(), ConstraintSpec::Regex(r)));
    let choice: Option<Vec<String>> = fields.take("guided_choice")?;
    if choice.as_ref().is_some_and(Vec::is_empty) {
        let message = "`guided_choice` needs at least one choice";
        return Err(ApiError::invalid("guided_choice", message));
    }
    let choice = choice.map(|labels| ("guided_choice".to_string(), ConstraintSpec::Labels(labels)));
    let mut all = [wanted, regex, choice].into_iter().flatten();
    let first = all.next();
    match all.next() {
        Some((param, _)) => {
            let message = format!("`{param}` cannot be combined with another constraint");
            Err(ApiError::invalid(param, message))
        }
        None => Ok(first),
    }
}
