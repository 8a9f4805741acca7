//! Changes to JSON documents.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

/// Values that may replace a value.
pub(crate) fn replacements() -> Vec<Value> {
    let mut values = vec![
        Value::Null,
        json!(true),
        json!(false),
        json!(""),
        json!("linear"),
        json!([]),
        json!({}),
        json!([1]),
        json!([0, 9_223_372_036_854_775_807_u64, 4]),
        json!([u32::MAX, u32::MAX, u32::MAX]),
        json!({"content": 5}),
    ];
    let whole = [0, -1, 1, 2, 3, 7, 8, 16, 64, 77, 512, 4096, 65_535, 65_536, 1 << 20, 1 << 31, i64::MAX, i64::MIN];
    values.extend(whole.map(Value::from));
    values.extend([0.5, -0.25, 1e-300, 1e300].map(Value::from));
    values.push(u64::MAX.into());
    values
}

/// Change of a document: the index of a place, and its new value; `None` removes it.
pub(crate) type Change = (Index, Option<Value>);

/// Generates up to three changes.
pub(crate) fn changes() -> impl Strategy<Value = Vec<Change>> {
    let value = prop::option::weighted(0.9, prop::sample::select(replacements()));
    prop::collection::vec((any::<Index>(), value), 1..4)
}

/// Returns the pointers to all values of a document, except the root.
fn places(document: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match document {
        Value::Object(values) => {
            values.iter().map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect()
        }
        Value::Array(values) => values.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let below = |(key, value): (String, &Value)| {
        let inner = places(value).into_iter().map(|rest| format!("/{key}{rest}")).collect::<Vec<_>>();
        std::iter::once(format!("/{key}")).chain(inner)
    };
    children.into_iter().flat_map(below).collect()
}

/// Sets the value at a place, or removes it; an array loses its last element instead.
pub(crate) fn change(document: &mut Value, place: &str, value: Option<Value>) {
    if let Some(value) = value {
        if let Some(old) = document.pointer_mut(place) {
            *old = value;
        }
        return;
    }
    let (parent, key) = place.rsplit_once('/').unwrap();
    match document.pointer_mut(parent) {
        Some(Value::Object(values)) => _ = values.remove(&key.replace("~1", "/").replace("~0", "~")),
        Some(Value::Array(values)) => _ = values.pop(),
        _ => {}
    }
}

/// Applies changes to a document at the places that they choose; an empty document stays as it is.
pub(crate) fn changed(mut document: Value, changes: Vec<Change>) -> Value {
    for (index, value) in changes {
        let places = places(&document);
        if !places.is_empty() {
            let place: &String = index.get(&places);
            change(&mut document, place, value);
        }
    }
    document
}
