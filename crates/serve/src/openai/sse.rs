//! Server-sent events: the body of a streamed answer.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use axum::response::{IntoResponse, Response};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_stream::Stream;

use super::answers::{Answers, Piece};
use crate::error::ApiError;

/// A stream that has had nothing to say for so long says a comment, so that proxies keep it open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns parts of answers into frames.
pub(crate) trait Writer: Send {
    /// What comes before any part.
    fn opening(&mut self) -> String;
    /// A part; the frames after the last are to end the stream.
    fn piece(&mut self, idx: usize, piece: Piece) -> String;
    /// A failure, after which nothing comes.
    fn failure(&mut self, error: &ApiError) -> String;
}

/// The response that streams `answers`.
pub(crate) fn response(answers: Answers, mut writer: Box<dyn Writer>) -> Response {
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let frames = Frames {
        answers,
        ready: writer.opening(),
        writer,
        tick,
        is_over: false,
    };
    let headers = [
        (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

/// One frame of data.
pub(crate) fn frame(data: &impl serde::Serialize) -> String {
    let json = serde_json::to_string(data).expect("wire types have string keys and finite numbers");
    format!("data: {json}\n\n")
}

/// The body of a streamed answer. Dropping it, as happens when the client is gone, drops the answers, which
/// cancels them.
struct Frames {
    answers: Answers,
    writer: Box<dyn Writer>,
    /// Written, not sent yet.
    ready: String,
    tick: Interval,
    is_over: bool,
}

impl Stream for Frames {
    type Item = Result<String, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while !this.is_over && this.ready.len() < 16 << 10 {
            match this.answers.poll_next(cx) {
                Poll::Ready(Some(Ok((idx, piece)))) => {
                    this.ready.push_str(&this.writer.piece(idx, piece));
                }
                Poll::Ready(Some(Err(error))) => {
                    this.ready.push_str(&this.writer.failure(&error));
                    this.is_over = true;
                }
                Poll::Ready(None) => this.is_over = true,
                Poll::Pending => break,
            }
        }
        if !this.ready.is_empty() {
            this.tick.reset();
            return Poll::Ready(Some(Ok(std::mem::take(&mut this.ready))));
        }
        if this.is_over {
            return Poll::Ready(None);
        }
        // Also registers the wake-up; a tick that is due is a comment.
        match this.tick.poll_tick(cx) {
            Poll::Ready(_) => Poll::Ready(Some(Ok(": waiting\n\n".to_string()))),
            Poll::Pending => Poll::Pending,
        }
    }
}
