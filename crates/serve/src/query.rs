//! Query strings, and the lists they ask for.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use bantam_store::{ListQuery, Object, Page};
use serde_json::{Value, json};

use crate::error::ApiError;

/// The name in an address. One that is not even text is the name of nothing.
pub(crate) struct Id(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(_) => Err(ApiError::no_object("object", "?")),
        }
    }
}

/// The names in an address, from left to right.
pub(crate) struct Ids<const N: usize>(pub(crate) [String; N]);

impl<const N: usize, S: Send + Sync> FromRequestParts<S> for Ids<N> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let names = Path::<Vec<String>>::from_request_parts(parts, state).await;
        let names = names.ok().and_then(|Path(names)| names.try_into().ok());
        names
            .map(Self)
            .ok_or_else(|| ApiError::no_object("object", "?"))
    }
}

/// The pairs of a query string, decoded.
pub(crate) fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    let parts = query.unwrap_or_default().split('&');
    parts
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = |b: u8| (b as char).to_digit(16);
        match bytes[at] {
            b'+' => out.push(b' '),
            b'%' if at + 2 < bytes.len() => match (hex(bytes[at + 1]), hex(bytes[at + 2])) {
                (Some(high), Some(low)) => {
                    out.push((high * 16 + low) as u8);
                    at += 2;
                }
                _ => out.push(b'%'),
            },
            byte => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Reads what a list is asked for. `label` is the name of the parameter that filters by label, if there is one.
pub(crate) fn list(
    query: Option<&str>,
    label: Option<&str>,
    metadata: bool,
    ascending: bool,
) -> Result<ListQuery, ApiError> {
    list_of_pairs(pairs(query), label, metadata, ascending)
}

/// The same of pairs.
pub(crate) fn list_of_pairs(
    pairs: Vec<(String, String)>,
    label: Option<&str>,
    metadata: bool,
    ascending: bool,
) -> Result<ListQuery, ApiError> {
    let mut list = ListQuery {
        limit: 20,
        ascending,
        ..ListQuery::default()
    };
    for (name, value) in pairs {
        match name.as_str() {
            "after" => list.after = Some(value),
            "limit" => {
                let limit = value.parse().ok().filter(|n| (1..=10_000).contains(n));
                let message = "`limit` must be between 1 and 10000";
                list.limit = limit.ok_or_else(|| ApiError::invalid("limit", message))?;
            }
            "order" => {
                list.ascending = match value.as_str() {
                    "asc" => true,
                    "desc" => false,
                    _ => {
                        let message = "`order` must be `asc` or `desc`";
                        return Err(ApiError::invalid("order", message));
                    }
                }
            }
            _ if Some(name.as_str()) == label => list.label = Some(value),
            _ => {
                let key = name.strip_prefix("metadata[").filter(|_| metadata);
                let Some(key) = key.and_then(|key| key.strip_suffix(']')) else {
                    return Err(ApiError::unknown(&name));
                };
                if list.metadata.len() == 16 {
                    let message = "at most 16 pairs of `metadata` can be asked for";
                    return Err(ApiError::invalid("metadata", message));
                }
                list.metadata.push((key.to_string(), value));
            }
        }
    }
    Ok(list)
}

/// Refuses every parameter: the address takes none.
pub(crate) fn none(query: Option<&str>) -> Result<(), ApiError> {
    match pairs(query).first() {
        Some((name, _)) => Err(ApiError::unknown(name)),
        None => Ok(()),
    }
}

/// A page as the API shows it; no page if `after` names nothing of the kind.
pub(crate) fn page(page: Option<Page>, show: impl Fn(Object) -> Value) -> Result<Value, ApiError> {
    let Some(page) = page else {
        let message = "`after` names nothing of this list";
        return Err(ApiError::invalid("after", message));
    };
    let data: Vec<Value> = page.objects.into_iter().map(show).collect();
    Ok(list_of(data, page.has_more))
}

/// The part of a list that is asked for; `all` is oldest first.
pub(crate) fn slice(mut all: Vec<Value>, query: &ListQuery) -> Result<Value, ApiError> {
    if !query.ascending {
        all.reverse();
    }
    if let Some(after) = &query.after {
        let Some(at) = all.iter().position(|item| item["id"] == after.as_str()) else {
            let message = "`after` names nothing of this list";
            return Err(ApiError::invalid("after", message));
        };
        all.drain(..=at);
    }
    let has_more = all.len() > query.limit;
    all.truncate(query.limit);
    Ok(list_of(all, has_more))
}

/// A list in OpenAI's shape.
pub(crate) fn list_of(data: Vec<Value>, has_more: bool) -> Value {
    let id = |value: Option<&Value>| value.map_or(Value::Null, |v| v["id"].clone());
    json!({
        "object": "list",
        "first_id": id(data.first()),
        "last_id": id(data.last()),
        "has_more": has_more,
        "data": data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_checked() {
        let query = list(
            Some("limit=2&metadata%5Ba+b%5D=c%26%C3%A9&after=x&order=desc&model=m"),
            Some("model"),
            true,
            true,
        )
        .unwrap();
        assert_eq!(query.limit, 2);
        assert_eq!(query.metadata, [("a b".to_string(), "c&é".to_string())]);
        assert_eq!(
            (
                query.after.as_deref(),
                query.label.as_deref(),
                query.ascending
            ),
            (Some("x"), Some("m"), false)
        );
        for bad in [
            "limit=0",
            "limit=x",
            "order=up",
            "colour=1",
            "metadata[a]=b",
            "%zz",
            "%",
        ] {
            assert!(list(Some(bad), None, false, true).is_err(), "{bad}");
        }
        assert!(none(None).is_ok() && none(Some("")).is_ok() && none(Some("a")).is_err());
    }
}
