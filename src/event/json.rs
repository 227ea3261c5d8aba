//! The event as JSON: the form for people and scripts. It may allocate; nobody sends a million of them.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::error::Category;

use super::{EventError, EventRef, Fields, Op};

/// Every known field as it stands: types are judged afterwards, as in MessagePack, so that the version is judged first.
#[derive(Deserialize)]
struct Loose {
    v: Option<Value>,
    op: Option<Value>,
    ttl: Option<Value>,
    ver: Option<Value>,
    origin: Option<Value>,
    fill: Option<Value>,
}

pub(super) fn decode(value: &[u8]) -> Result<EventRef<'_>, EventError> {
    let loose: Loose = serde_json::from_slice(value).map_err(|error| match error.classify() {
        // Fields of any type are taken and unknown ones ignored: what is left is one that came twice.
        Category::Data => EventError::DuplicateField,
        _ => EventError::NotJson {
            line: error.line(),
            column: error.column(),
        },
    })?;
    let mut fields = Fields::default();
    fields.version = fields.keep(integer(loose.v, "v"));
    fields.op = fields.keep(op(loose.op));
    let ttl = integer(loose.ttl, "ttl").and_then(|ttl| match ttl.map(u32::try_from).transpose() {
        Ok(ttl) => Ok(ttl),
        Err(_) => Err(EventError::OutOfRange { field: "ttl" }),
    });
    fields.ttl = fields.keep(ttl);
    fields.ver = fields.keep(version_clock(loose.ver));
    fields.origin = fields.keep(text(loose.origin, "origin")).map(Cow::Owned);
    fields.fill = fields.keep(boolean(loose.fill, "fill")).unwrap_or(false);
    fields.finish()
}

fn integer(value: Option<Value>, field: &'static str) -> Result<Option<u64>, EventError> {
    let Some(value) = value else { return Ok(None) };
    match value.as_u64() {
        Some(number) => Ok(Some(number)),
        None if value.is_i64() => Err(EventError::OutOfRange { field }),
        // Too large for 64 bits, serde_json hands out a float: it cannot be told from one, and neither is an integer.
        None => Err(EventError::WrongType { field }),
    }
}

/// `ver` exceeds 2^53, beyond which JavaScript rounds: it may be a decimal string.
fn version_clock(value: Option<Value>) -> Result<Option<u64>, EventError> {
    match value {
        Some(Value::String(digits)) => {
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(EventError::WrongType { field: "ver" });
            }
            digits
                .parse()
                .map(Some)
                .map_err(|_| EventError::OutOfRange { field: "ver" })
        }
        other => integer(other, "ver"),
    }
}

fn text(value: Option<Value>, field: &'static str) -> Result<Option<String>, EventError> {
    match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(EventError::WrongType { field }),
    }
}

fn boolean(value: Option<Value>, field: &'static str) -> Result<Option<bool>, EventError> {
    match value {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(EventError::WrongType { field }),
    }
}

fn op(value: Option<Value>) -> Result<Option<Op>, EventError> {
    match text(value, "op")? {
        None => Ok(None),
        Some(name) => Op::from_bytes(name.as_bytes())
            .map(Some)
            .ok_or_else(|| EventError::unknown_op(name.as_bytes())),
    }
}
