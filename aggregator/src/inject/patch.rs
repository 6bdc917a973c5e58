//! The changes that an injection makes, as operations of a JSON patch (RFC 6902).

use serde::Serialize;
use serde_json::Value;

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Operation {
    /// What is done.
    pub op: Op,
    /// Where (RFC 6901).
    pub path: String,
    /// What stands there afterwards.
    pub value: Value,
}

/// What a change does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Puts a new value in, in a list before what was there.
    Add,
    /// Puts a value in the place of one.
    Replace,
}

/// Why a patch does not fit a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the patch does not fit: there is no {0}")]
pub struct PatchError(String);

// === impl Operation ===

impl Operation {
    pub(super) fn add(path: impl Into<String>, value: Value) -> Self {
        Self {
            op: Op::Add,
            path: path.into(),
            value,
        }
    }

    pub(super) fn replace(path: impl Into<String>, value: Value) -> Self {
        Self {
            op: Op::Replace,
            path: path.into(),
            value,
        }
    }

    fn apply(&self, document: &mut Value) -> Option<()> {
        let (parent, last) = self.path.rsplit_once('/')?;
        let last = last.replace("~1", "/").replace("~0", "~");
        match (self.op, document.pointer_mut(parent)?) {
            (Op::Add, Value::Object(map)) => {
                map.insert(last, self.value.clone());
            }
            (Op::Add, Value::Array(list)) if last == "-" => list.push(self.value.clone()),
            (Op::Add, Value::Array(list)) => {
                let index = last.parse::<usize>().ok().filter(|index| *index <= list.len())?;
                list.insert(index, self.value.clone());
            }
            (Op::Replace, Value::Object(map)) => *map.get_mut(&last)? = self.value.clone(),
            (_, _) => return None,
        }
        Some(())
    }
}

/// Applies operations in turn. After an error the document is left as far as it came.
pub fn apply(document: &mut Value, patch: &[Operation]) -> Result<(), PatchError> {
    for operation in patch {
        operation
            .apply(document)
            .ok_or_else(|| PatchError(operation.path.clone()))?;
    }
    Ok(())
}

/// A key as a part of a path (RFC 6901, section 3).
pub(super) fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
