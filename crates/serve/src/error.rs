//! Why the server did not start, and how a request's failure looks on the wire.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bantam_engine::{RequestError, SubmitError};
use serde_json::json;
use thiserror::Error;

/// The server could not start, or stopped for a reason of its own.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Open to other machines, and no key.
    #[error(
        "`{host}` can be reached by other machines and no API key is set; hint: set a key, or listen on 127.0.0.1"
    )]
    KeyNeeded {
        /// The address asked for.
        host: IpAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; hint: another server may have the port")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// There is nothing to serve, or a name is used twice.
    #[error("{0}")]
    Models(String),
    /// A model's engine could not be made.
    #[error("model `{id}` did not load: {reason}")]
    Load {
        /// The model.
        id: String,
        /// Why.
        reason: String,
    },
    /// A certificate or its key cannot be used.
    #[error("TLS: {}: {reason}; hint: both must be PEM files", path.display())]
    Tls {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        reason: String,
    },
    /// This is no origin.
    #[error(
        "`{origin}` is not the origin of a page; hint: give scheme, host and port as browsers send them, as in `https://app.example.com` or `http://localhost:5173`"
    )]
    Origin {
        /// What was given.
        origin: String,
    },
    /// What webhooks are to be signed with is no secret.
    #[error(
        "a webhook's secret is base64 of at least 16 bytes, with or without `whsec_` before it; hint: `openssl rand -base64 24` makes one"
    )]
    WebhookSecret,
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] bantam_store::StoreError),
    /// The system refused a thread, a signal handler or a socket.
    #[error("the server failed: {0}")]
    System(#[from] std::io::Error),
}

/// An error in OpenAI's shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) kind: &'static str,
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    /// When to try again.
    pub(crate) retry_ms: Option<u64>,
    /// Clients try some kinds of error again on their own; is there any use in it?
    pub(crate) should_retry: bool,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            message: message.into(),
            kind,
            param: None,
            code: Some(code),
            retry_ms: None,
            should_retry: true,
        }
    }

    fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn bad(code: &'static str, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, code, message).at(param)
    }

    /// A value that is not what the field takes.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad("invalid_value", param, message)
    }

    /// A field that is needed and absent.
    pub(crate) fn missing(param: &str) -> Self {
        Self::bad(
            "missing_required_parameter",
            param,
            format!("`{param}` is missing"),
        )
    }

    /// A field that the API does not have.
    pub(crate) fn unknown(param: &str) -> Self {
        Self::bad(
            "unknown_parameter",
            param,
            format!("unknown parameter `{param}`"),
        )
    }

    /// A field, or a value of one, that OpenAI has and this server has not.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad("unsupported_parameter", param, message)
    }

    /// A schema or pattern that cannot be enforced; serving without it would be a lie.
    pub(crate) fn constraint(param: &str, message: String) -> Self {
        Self::bad("unsupported_constraint", param, message)
    }

    /// An uploaded file that is not what its purpose asks for.
    pub(crate) fn bad_file(message: impl Into<String>) -> Self {
        Self::bad("invalid_file", "file", message)
    }

    /// A text that is longer than the model reads.
    pub(crate) fn too_long_input(param: &str, tokens: usize, max: usize) -> Self {
        let message =
            format!("`{param}` has {tokens} tokens, more than the model's context of {max}");
        Self::bad("context_length_exceeded", param, message)
    }

    pub(crate) fn malformed_json(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_json", message)
    }

    pub(crate) fn not_json() -> Self {
        let message = "the body must be sent with `content-type: application/json`";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            INVALID,
            "unsupported_media_type",
            message,
        )
    }

    pub(crate) fn not_multipart() -> Self {
        let message = "the body must be a well-formed `multipart/form-data`";
        Self::new(
            StatusCode::BAD_REQUEST,
            INVALID,
            "invalid_multipart",
            message,
        )
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the body is longer than {limit} bytes");
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            INVALID,
            "request_too_large",
            message,
        )
    }

    pub(crate) fn body_broken() -> Self {
        let message = "the body ended early";
        Self::new(StatusCode::BAD_REQUEST, INVALID, "incomplete_body", message)
    }

    pub(crate) fn body_slow() -> Self {
        let message = "the body took too long to arrive";
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            INVALID,
            "request_timeout",
            message,
        )
    }

    pub(crate) fn no_route() -> Self {
        let message =
            "there is nothing at this address; see `/v1/models` and `/v1/chat/completions`";
        Self::new(StatusCode::NOT_FOUND, INVALID, "unknown_url", message)
    }

    pub(crate) fn wrong_method() -> Self {
        let message = "this address does not take this method";
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            INVALID,
            "method_not_allowed",
            message,
        )
    }

    pub(crate) fn no_model(id: &str) -> Self {
        let message = format!("the model `{id}` does not exist here; see `/v1/models`");
        Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message).at("model")
    }

    pub(crate) fn missing_key() -> Self {
        let message = "no API key; send `Authorization: Bearer KEY`";
        Self::new(
            StatusCode::UNAUTHORIZED,
            INVALID,
            "missing_api_key",
            message,
        )
    }

    pub(crate) fn wrong_key() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            INVALID,
            "invalid_api_key",
            "the API key is not valid",
        )
    }

    pub(crate) fn out_of_scope(scope: &str) -> Self {
        let message = format!("this API key may not do this: it lacks the scope `{scope}`");
        Self::new(
            StatusCode::FORBIDDEN,
            INVALID,
            "insufficient_scope",
            message,
        )
    }

    /// More requests or tokens a minute than the key may use.
    pub(crate) fn limited(what: &'static str, retry_ms: u64) -> Self {
        let message = format!("too many {what} a minute for this API key; try again later");
        let code = "rate_limit_exceeded";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, what, code, message);
        error.retry_ms = Some(retry_ms);
        error
    }

    /// The key has used its tokens of the day.
    pub(crate) fn over_budget(seconds: u64) -> Self {
        let code = "insufficient_quota";
        let message = format!(
            "this API key has used its tokens of the day; there are new ones in {seconds} s"
        );
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, code, code, message);
        error.retry_ms = Some(seconds.saturating_mul(1000));
        error.should_retry = false;
        error
    }

    /// The database failed; why is nobody's business but the operator's.
    pub(crate) fn store(error: bantam_store::StoreError) -> Self {
        tracing::error!(%error, "the database failed");
        Self::internal("the database failed")
    }

    /// Something of `kind` that does not exist, or belongs to someone else.
    pub(crate) fn no_object(kind: &str, id: &str) -> Self {
        let message = format!("no {kind} `{id:.80}` was found");
        Self::new(StatusCode::NOT_FOUND, INVALID, "not_found", message)
    }

    /// It cannot be done in the present state of things; trying again does not help.
    pub(crate) fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, code, message)
    }

    /// The same request is being answered; its answer will be there later.
    pub(crate) fn in_progress() -> Self {
        let message = "a request with this `Idempotency-Key` is being answered";
        let code = "idempotency_in_progress";
        let mut error = Self::new(StatusCode::CONFLICT, INVALID, code, message);
        error.retry_ms = Some(500);
        error
    }

    pub(crate) fn protected(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, INVALID, "protected", message)
    }

    pub(crate) fn foreign_host() -> Self {
        let message = "without an API key this server answers to `localhost` only";
        Self::new(StatusCode::FORBIDDEN, INVALID, "forbidden_host", message)
    }

    pub(crate) fn busy() -> Self {
        let message = "too many requests are waiting; try again later";
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "queue_full",
            message,
        );
        error.retry_ms = Some(1000);
        error
    }

    /// The answer took longer than the server allows.
    pub(crate) fn too_long() -> Self {
        let message = "the answer took longer than this server allows; ask for fewer tokens";
        let status = StatusCode::GATEWAY_TIMEOUT;
        let mut error = Self::new(status, "server_error", "deadline_exceeded", message);
        error.should_retry = false;
        error
    }

    pub(crate) fn stopping() -> Self {
        let message = "the server is stopping";
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "server_stopping",
            message,
        )
    }

    /// The files of a model cannot be used; why is in the log.
    pub(crate) fn not_loaded(id: &str) -> Self {
        let message = format!("the model `{id}` could not be loaded; the server's log says why");
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "server_error", "model_not_loaded", message).at("model")
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "internal_error",
            message,
        )
    }

    /// How long whoever is in no hurry waits before asking again; `None` if there was room, or asking is no use.
    pub(crate) fn pause(&self) -> Option<Duration> {
        let is_full = self.status == StatusCode::TOO_MANY_REQUESTS && self.should_retry;
        let ms = self.retry_ms.unwrap_or(1000).clamp(50, 5000);
        is_full.then(|| Duration::from_millis(ms))
    }

    /// The body of the response, and the data of a stream's error event.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(ms) = self.retry_ms {
            headers.insert("retry-after-ms", HeaderValue::from(ms));
            headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        }
        if !self.should_retry {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The rest of the body is not read, so the connection cannot be used again.
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::ContextOverflow { .. } => {
                Self::bad("context_length_exceeded", "messages", message)
            }
            SubmitError::EmptyPrompt => Self::invalid("messages", message),
            SubmitError::NoTokensWanted => Self::invalid("max_tokens", message),
            SubmitError::UnknownToken { .. } => Self::invalid("logit_bias", message),
            SubmitError::BadSampling { name, .. } => Self::invalid(name, message),
            // The door names adapters, so one that is gone was unloaded a moment ago.
            SubmitError::UnknownAdapter { .. } => Self::invalid("model", message),
            SubmitError::QueueFull { .. } => Self::busy(),
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused(error) => error.into(),
            // What a model panicked with may quote its input; it is logged nowhere and told no one.
            RequestError::Model(_) => Self::internal("the model failed on this request"),
            error => Self::internal(error.to_string()),
        }
    }
}
