//! Reference of a YAML file, from the struct that reads it: a JSON Schema for editors, and tables of its keys.

use std::slice;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use crate::repository;

/// Compares `docs/reference/{part}.schema.json` and the part of `docs/reference/config.md` with the YAML that `T` reads.
#[track_caller]
pub fn check_config<T: JsonSchema>(part: &str) {
    let schema = config_schema::<T>();
    let file = repository().join(format!("docs/reference/{part}.schema.json"));
    super::check_file(&file, &format!("{schema:#}\n"));
    super::check("config.md", part, &config_table(&schema));
}

/// Describes the YAML that `T` reads in JSON Schema, in the draft that YAML editors know best.
pub fn config_schema<T: JsonSchema>() -> Value {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<T>().to_value();
    tidy(&mut schema);
    schema
}

/// Writes numbers as short as the program reads them, and descriptions without line breaks and links of rustdoc.
fn tidy(node: &mut Value) {
    match node {
        Value::Object(keys) => {
            for (key, value) in keys {
                match value {
                    Value::String(text) if key == "description" => *text = plain(text),
                    _ => tidy(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(tidy),
        Value::Number(number) if number.is_f64() => {
            // A 32-bit float was widened on its way here: 0.9 became 0.8999999761581421.
            let narrow = number.as_f64().unwrap() as f32;
            if Some(f64::from(narrow)) == number.as_f64() {
                *node = narrow.to_string().parse::<f64>().unwrap().into();
            }
        }
        _ => {}
    }
}

/// Takes the paragraphs before the first heading, such as that of examples. Joins the lines of each, and turns
/// rustdoc's links, "[`X`]" and "[`X`](X)", into code.
fn plain(text: &str) -> String {
    let joined = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let paragraphs = text.split("\n\n").take_while(|paragraph| !paragraph.starts_with('#'));
    let text = paragraphs.map(joined).collect::<Vec<_>>().join("\n\n");
    let mut parts = text.split("[`");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (code, mut rest) = part.split_once("`]").unwrap();
        if let Some((_, after)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            rest = after;
        }
        plain += &format!("`{code}`{rest}");
    }
    plain
}

/// Describes the YAML of `schema` in Markdown: a section per map, with a table of its keys. The first has no heading.
pub fn config_table(schema: &Value) -> String {
    let mut page = Page { schema, sections: Vec::new() };
    page.collect("", schema);
    page.sections.iter().map(|section| page.section(section)).collect()
}

/// All maps of a YAML.
struct Page<'a> {
    schema: &'a Value,
    sections: Vec<Section<'a>>,
}

/// Map with fixed keys, and its places in the YAML.
struct Section<'a> {
    map: &'a Value,
    places: Vec<String>,
}

impl<'a> Page<'a> {
    /// Follows references and options to the schema that describes the value.
    fn resolve(&self, node: &'a Value) -> &'a Value {
        if let Some(path) = node["$ref"].as_str() {
            return self.resolve(self.schema.pointer(path.trim_start_matches('#')).unwrap());
        }
        match (list(node, "allOf"), list(node, "anyOf")) {
            ([only], _) | (_, [only, _]) => self.resolve(only),
            _ => node,
        }
    }

    /// Collects the maps of `node`, which is at `place`, in the order of the YAML.
    fn collect(&mut self, place: &str, node: &'a Value) {
        let node = self.resolve(node);
        if let Some(keys) = node["properties"].as_object() {
            if let Some(known) = self.sections.iter_mut().find(|section| std::ptr::eq(section.map, node)) {
                known.places.push(place.into());
                return;
            }
            self.sections.push(Section { map: node, places: vec![place.into()] });
            keys.iter()
                .filter(|(_, node)| !is_hidden(node))
                .for_each(|(key, node)| self.collect(&join(place, key), node));
        } else if node["items"].is_object() {
            self.collect(&format!("{place}[]"), &node["items"]);
        } else if let Some(map) = self.common_map(node) {
            self.collect(&join(place, "*"), map);
        } else {
            self.tagged(node).for_each(|(tag, map)| self.collect(&join(place, tag), map));
        }
    }

    /// Lists the variants that are maps with one key, as in `{cosine: {min_factor: 0}}`.
    fn tagged(&self, node: &'a Value) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        list(node, "oneOf").iter().flat_map(keys)
    }

    /// Returns the map that all of several variants have.
    fn common_map(&self, node: &'a Value) -> Option<&'a Value> {
        let maps: Vec<&Value> = self.tagged(node).map(|(_, map)| self.resolve(map)).collect();
        let (first, rest) = maps.split_first()?;
        (!rest.is_empty() && rest.iter().all(|map| std::ptr::eq(*map, *first))).then_some(first)
    }

    fn section(&self, section: &Section<'a>) -> String {
        let Section { map, places } = section;
        let mut text = match places[0].as_str() {
            "" => String::new(),
            _ => format!("### {}\n\n", self.heading(places)),
        };
        if let Some(meaning) = map["description"].as_str() {
            text += &format!("{meaning}\n\n");
        }
        text += "| key | type | default | meaning |\n|---|---|---|---|\n";
        for (key, node) in keys(map).filter(|(_, node)| !is_hidden(node)) {
            let needed = list(map, "required").iter().any(|needed| needed == key);
            let cells = [self.kind(node), self.default(node, needed), self.meaning(node)];
            text += &format!("| `{key}` | {} |\n", cells.map(|cell| escaped(&cell)).join(" | "));
        }
        text + "\n"
    }

    fn heading(&self, places: &[String]) -> String {
        let title = self.schema["title"].as_str().unwrap();
        format!("{title}: {}", code(places.iter()))
    }

    /// Names a type in words.
    fn kind(&self, node: &'a Value) -> String {
        let null = list(node, "anyOf").iter().any(|choice| choice["type"] == "null");
        let node = self.resolve(node);
        let kinds = match &node["type"] {
            Value::Array(kinds) => kinds,
            kind => slice::from_ref(kind),
        };
        let null = if null || kinds.iter().any(|kind| kind == "null") { " or null" } else { "" };
        let choices = choices(node);
        let kind = match kinds[0].as_str() {
            _ if choices.len() > 1 => format!("one of {}", code(choices.into_iter())),
            _ if choices.len() == 1 => code(choices.into_iter()),
            Some("array") => {
                let count = node["minItems"].as_u64().map(|count| format!("{count} ")).unwrap_or_default();
                let each = self.kind(&node["items"]);
                let each = each.strip_prefix("one of ").map_or(format!("{each}s"), String::from);
                format!("list of {count}{each}")
            }
            Some("boolean") => "true or false".into(),
            Some("object") => {
                let places = self.sections.iter().find(|section| std::ptr::eq(section.map, node)).map(|it| &it.places);
                format!("[map](#{})", slug(&self.heading(places.unwrap())))
            }
            Some("string") if node["format"] == "path" => "path".into(),
            kind => kind.unwrap().into(),
        };
        kind + null
    }

    fn default(&self, node: &'a Value, needed: bool) -> String {
        let map = &self.resolve(node)["properties"];
        match &node["default"] {
            _ if needed => "required".into(),
            Value::Null => "none".into(),
            // The map's own table has the same.
            Value::Object(values) if values.iter().all(|(key, value)| map[key].get("default") == Some(value)) => {
                String::new()
            }
            value => format!("`{}`", yaml(value)),
        }
    }

    /// Joins the descriptions of a key and of its choices.
    fn meaning(&self, node: &'a Value) -> String {
        let mut meaning = node["description"].as_str().unwrap_or_default().replace("\n\n", " ");
        let mut value = self.resolve(node);
        if value["items"].is_object() {
            value = self.resolve(&value["items"]);
        }
        for variant in list(value, "oneOf") {
            if let (Some(choice), Some(text)) = (choices_of(variant).next(), variant["description"].as_str()) {
                meaning += &format!(" `{choice}`: {}", text.replace("\n\n", " "));
            }
        }
        meaning
    }
}

/// Lists the values of an enum: plain words, and the keys of variants that are maps.
fn choices(node: &Value) -> Vec<&str> {
    match list(node, "oneOf") {
        [] => words(node).collect(),
        variants => variants.iter().flat_map(choices_of).collect(),
    }
}

fn choices_of(variant: &Value) -> impl Iterator<Item = &str> {
    words(variant).chain(keys(variant).map(|(tag, _)| tag.as_str()))
}

fn words(node: &Value) -> impl Iterator<Item = &str> {
    node.get("const").map_or(list(node, "enum"), slice::from_ref).iter().filter_map(Value::as_str)
}

/// Tells whether a key is only read for the sake of older files.
fn is_hidden(node: &Value) -> bool {
    node["deprecated"] == true
}

fn list<'a>(node: &'a Value, key: &str) -> &'a [Value] {
    node[key].as_array().map_or(&[], Vec::as_slice)
}

fn keys(node: &Value) -> impl Iterator<Item = (&String, &Value)> {
    node["properties"].as_object().into_iter().flatten()
}

fn join(place: &str, key: &str) -> String {
    if place.is_empty() { key.into() } else { format!("{place}.{key}") }
}

fn code(words: impl Iterator<Item = impl std::fmt::Display>) -> String {
    words.map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// Writes a value as in a YAML, on one line.
fn yaml(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => format!("[{}]", values.iter().map(yaml).collect::<Vec<_>>().join(", ")),
        Value::Object(keys) => {
            let entries: Vec<String> = keys.iter().map(|(key, value)| format!("{key}: {}", yaml(value))).collect();
            format!("{{{}}}", entries.join(", "))
        }
        other => other.to_string(),
    }
}

/// Escapes the text of a cell.
fn escaped(cell: &str) -> String {
    let outside = |(index, part): (usize, &str)| if index % 2 == 0 { part.replace('<', "\\<") } else { part.into() };
    cell.replace('|', "\\|").split('`').enumerate().map(outside).collect::<Vec<_>>().join("`")
}

/// Returns the anchor that GitHub gives a heading.
fn slug(heading: &str) -> String {
    let kept = |letter: &char| letter.is_alphanumeric() || "_- ".contains(*letter);
    heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}
