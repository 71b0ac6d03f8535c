//! Pages of other origins that may call the API.
//!
//! Browsers keep a page from reading what another origin answers, unless that origin says that it may. The server says
//! so to no one but the origins that its owner names; a page then sends a key like any other client, never a cookie.

use std::str::FromStr;
use std::time::Duration;

use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use tower_http::cors::{AllowHeaders, CorsLayer};

use crate::ServeError;
use crate::caller::LEFT;

/// How long a browser may rely on what it was told.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// Where a page comes from, as browsers spell it: scheme, host and, unless it is the scheme's own, port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl FromStr for Origin {
    type Err = ServeError;

    fn from_str(text: &str) -> Result<Self, ServeError> {
        let bad = || ServeError::Origin {
            origin: text.to_string(),
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(bad)?;
        let own_port = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return Err(bad()),
        };
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        // What a browser would not send could never match.
        let as_sent = authority.as_str() == rest
            && !rest.contains(['@', '*'])
            && rest == rest.to_ascii_lowercase()
            && (authority.host() == rest
                || authority.port_u16().is_some_and(|port| port != own_port));
        if !as_sent {
            return Err(bad());
        }
        HeaderValue::from_str(text).map(Origin).map_err(|_| bad())
    }
}

/// Answers for the browser; `None` if no page may call.
pub(crate) fn layer(origins: &[Origin]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let told = ["x-request-id", "retry-after-ms", "x-should-retry"];
    let told = told.into_iter().chain(LEFT).map(HeaderName::from_static);
    Some(
        CorsLayer::new()
            .allow_origin(
                origins
                    .iter()
                    .map(|origin| origin.0.clone())
                    .collect::<Vec<_>>(),
            )
            .allow_methods([Method::GET, Method::POST, Method::DELETE])
            // The clients send headers of their own, which change with their version.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(told.chain([RETRY_AFTER]).collect::<Vec<_>>())
            // A server on loopback is a private network to a page from elsewhere.
            .allow_private_network(true)
            .max_age(MAX_AGE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_as_browsers_send_it() {
        for good in [
            "https://app.example.com",
            "http://localhost:5173",
            "http://[::1]:3000",
        ] {
            assert!(good.parse::<Origin>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "*",
            "null",
            "app.example.com",
            "https://app.example.com/",
            "https://app.example.com/path",
            "https://APP.example.com",
            "https://*.example.com",
            "https://me@example.com",
            "https://app.example.com:443",
            "http://app.example.com:80",
            "https://app.example.com:99999",
            "ftp://app.example.com",
            "https://",
            "https://a b",
            "https://a\n",
        ] {
            let error = bad.parse::<Origin>().unwrap_err().to_string();
            assert!(error.contains("hint:"), "{bad}: {error}");
        }
    }
}
