//! The OpenAI API: its wire types, and nothing of them beyond this folder.

pub(crate) mod chat;
pub(crate) mod models;
mod request;
mod response;
