//! Types out of a YAML tree, with the line of every complaint.
//!
//! A serde deserializer over [`Node`]. Where serde would let a field that no one knows pass in silence, this
//! one writes it down, together with the names the type does know.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde::de::DeserializeSeed;
use serde::de::Deserializer;
use serde::de::Error as _;
use serde::de::Expected;
use serde::de::IntoDeserializer;
use serde::de::MapAccess;
use serde::de::SeqAccess;
use serde::de::Unexpected;
use serde::de::Visitor;
use serde::de::value::StrDeserializer;

use crate::yaml::Entry;
use crate::yaml::Node;
use crate::yaml::Value;
use crate::yaml::is_null;

/// A field that its type does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownField {
    /// Where it is written.
    pub line: u32,
    /// Its name.
    pub field: String,
    /// The type it was written in.
    pub within: &'static str,
    /// The fields that type has.
    pub known: &'static [&'static str],
}

/// Why a tree does not fit a type.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DecodeError {
    /// The line of what does not fit; 0 while it is not known.
    pub line: u32,
    /// The way there, outermost segment last while it is being collected.
    path: Vec<String>,
    message: String,
    /// What to write instead, or empty.
    pub hint: String,
}

/// Makes a `T` of `node`; adds what it does not know to `unknown`.
pub fn decode<'n, T: Deserialize<'n>>(
    node: &'n Node,
    unknown: &RefCell<Vec<UnknownField>>,
) -> Result<T, DecodeError> {
    T::deserialize(Decoder { node, unknown, field: None }).map_err(|error| error.or_line(node.line))
}

/// Further errors of one object that are told.
const ERRORS_MAX: usize = 20;

/// [`decode`]s, and says everything that does not fit: what an error is about is left out, and it is tried again.
pub fn decode_all<T: DeserializeOwned>(
    node: &Arc<Node>,
    unknown: &RefCell<Vec<UnknownField>>,
) -> Result<T, Vec<DecodeError>> {
    let first = match decode::<T>(node, unknown) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    let mut errors = vec![first];
    let mut rest = Arc::clone(node);
    while errors.len() < ERRORS_MAX
        && let Some(error) = errors.last()
        && let Some(without) = without(&rest, &mut error.path.iter().rev().map(String::as_str))
    {
        rest = without;
        let mut unknown_too = unknown.borrow_mut();
        let known = RefCell::default();
        let result = decode::<T>(&rest, &known);
        for field in known.into_inner() {
            if !unknown_too.contains(&field) {
                unknown_too.push(field);
            }
        }
        match result {
            Ok(_) => break,
            // It is what was left out that is missing.
            Err(error) if error.message.starts_with("missing field") => break,
            Err(error) => errors.push(error),
        }
    }
    Err(errors)
}

/// The tree without what `path` leads to; of a list that has it, all.
fn without(node: &Node, path: &mut dyn Iterator<Item = &str>) -> Option<Arc<Node>> {
    let segment = path.next()?;
    let Value::Map(entries) = &node.value else { return None };
    let mut kept = Vec::with_capacity(entries.len());
    let mut found = false;
    for entry in entries {
        let Entry { key, line, value } = entry;
        let copy = |value| Entry { key: key.clone(), line: *line, value };
        if **key != *segment {
            kept.push(copy(Arc::clone(value)));
            continue;
        }
        found = true;
        kept.extend(without(value, path).map(copy));
    }
    found.then(|| Arc::new(Node { line: node.line, value: Value::Map(kept) }))
}

impl DecodeError {
    fn or_line(mut self, line: u32) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }

    fn within(mut self, segment: String, line: u32) -> Self {
        self.path.push(segment);
        self.or_line(line)
    }

    fn hint(mut self, hint: String) -> Self {
        self.hint = hint;
        self
    }
}

impl std::error::Error for DecodeError {}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, segment) in self.path.iter().rev().enumerate() {
            match segment.starts_with('[') || depth == 0 {
                true => f.write_str(segment)?,
                false => write!(f, ".{segment}")?,
            }
        }
        if !self.path.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

impl serde::de::Error for DecodeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { message: message.to_string(), ..Self::default() }
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::custom(format_args!("expected {}, found {}", wanted(expected), Found(unexpected)))
    }
}

/// What a type wants, in an operator's words.
fn wanted(expected: &dyn Expected) -> String {
    let expected = expected.to_string();
    match expected.as_str() {
        "i8" | "i16" | "i32" | "i64" | "u8" | "u16" | "u32" | "u64" | "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        other if other.starts_with("struct ") => "a mapping".to_owned(),
        _ => expected,
    }
}

/// What was found, in an operator's words.
struct Found<'a>(Unexpected<'a>);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Unexpected::Unit | Unexpected::Option => f.write_str("nothing"),
            Unexpected::Str(text) => write!(f, "the text {text:?}"),
            Unexpected::Signed(number) => write!(f, "the number {number}"),
            Unexpected::Unsigned(number) => write!(f, "the number {number}"),
            Unexpected::Float(number) => write!(f, "the number {number}"),
            Unexpected::Bool(value) => write!(f, "{value}"),
            Unexpected::Map => f.write_str("a mapping"),
            Unexpected::Seq => f.write_str("a list"),
            other => write!(f, "{other}"),
        }
    }
}

/// One value that is to become a type.
#[derive(Clone, Copy)]
struct Decoder<'n, 'u> {
    node: &'n Node,
    unknown: &'u RefCell<Vec<UnknownField>>,
    /// The field this is the value of, when it is one of a struct.
    field: Option<Field<'n>>,
}

#[derive(Clone, Copy)]
struct Field<'n> {
    entry: &'n Entry,
    within: &'static str,
    known: &'static [&'static str],
}

/// What a scalar is by YAML's core schema.
enum Scalar<'n> {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(&'n str),
}

impl<'n> Scalar<'n> {
    fn new(text: &'n str, plain: bool) -> Self {
        if !plain {
            return Self::Text(text);
        }
        match text {
            _ if is_null(text) => return Self::Null,
            "true" | "True" | "TRUE" => return Self::Bool(true),
            "false" | "False" | "FALSE" => return Self::Bool(false),
            _ => {}
        }
        if let Some(hex) = text.strip_prefix("0x") {
            return u64::from_str_radix(hex, 16).map_or(Self::Text(text), Self::Unsigned);
        }
        if let Some(octal) = text.strip_prefix("0o") {
            return u64::from_str_radix(octal, 8).map_or(Self::Text(text), Self::Unsigned);
        }
        if let Ok(number) = text.parse() {
            return Self::Unsigned(number);
        }
        if let Ok(number) = text.parse() {
            return Self::Signed(number);
        }
        // Rust also reads "inf" and "nan" as numbers, YAML does not.
        let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c))
            && text.chars().any(|c| c.is_ascii_digit());
        match text.parse() {
            Ok(number) if numeric => Self::Float(number),
            _ => Self::Text(text),
        }
    }

    fn unexpected(&self) -> Unexpected<'n> {
        match *self {
            Self::Null => Unexpected::Unit,
            Self::Bool(value) => Unexpected::Bool(value),
            Self::Signed(number) => Unexpected::Signed(number),
            Self::Unsigned(number) => Unexpected::Unsigned(number),
            Self::Float(number) => Unexpected::Float(number),
            Self::Text(text) => Unexpected::Str(text),
        }
    }
}

impl<'n> Decoder<'n, '_> {
    fn scalar(&self) -> Option<Scalar<'n>> {
        match &self.node.value {
            Value::Scalar { text, plain } => Some(Scalar::new(text, *plain)),
            Value::List(_) | Value::Map(_) => None,
        }
    }

    /// A text must be written as one: `1.20` as a label would otherwise become `1.2`.
    fn string<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match (&self.node.value, self.scalar()) {
            (_, Some(Scalar::Text(text))) => visitor.visit_borrowed_str(text),
            (Value::Scalar { text, .. }, Some(other)) => {
                let hint = format!("write \"{text}\" in quotes");
                Err(DecodeError::invalid_type(other.unexpected(), &"a text").hint(hint))
            }
            _ => self.deserialize_any(visitor),
        }
        .map_err(|error| error.or_line(self.node.line))
    }

    /// A number or boolean must not be written as a text.
    fn bare<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        let quoted = match &self.node.value {
            Value::Scalar { text, plain: false }
                if !matches!(Scalar::new(text, true), Scalar::Text(_) | Scalar::Null) =>
            {
                Some(text)
            }
            _ => None,
        };
        self.deserialize_any(visitor).map_err(|error| match quoted {
            Some(text) => error.hint(format!("write {text} without quotes")),
            None => error,
        })
    }
}

macro_rules! forward {
    ($to:ident: $($method:ident)*) => {
        $(fn $method<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            self.$to(visitor)
        })*
    };
}

impl<'n> Deserializer<'n> for Decoder<'n, '_> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        let Self { node, unknown, .. } = self;
        match &node.value {
            Value::Scalar { text, plain } => match Scalar::new(text, *plain) {
                Scalar::Null => visitor.visit_unit(),
                Scalar::Bool(value) => visitor.visit_bool(value),
                Scalar::Signed(number) => visitor.visit_i64(number),
                Scalar::Unsigned(number) => visitor.visit_u64(number),
                Scalar::Float(number) => visitor.visit_f64(number),
                Scalar::Text(text) => visitor.visit_borrowed_str(text),
            },
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate(), unknown }),
            Value::Map(entries) => visitor.visit_map(Entries::new(entries, unknown, "", &[])),
        }
        .map_err(|error| error.or_line(node.line))
    }

    fn deserialize_option<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        if self.node.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_struct<V: Visitor<'n>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match &self.node.value {
            Value::Map(entries) => visitor
                .visit_map(Entries::new(entries, self.unknown, name, fields))
                .map_err(|error| error.or_line(self.node.line)),
            // A struct is never written as a list, though serde would take one.
            Value::List(_) => Err(DecodeError::invalid_type(Unexpected::Seq, &"a mapping")
                .or_line(self.node.line)
                .hint("remove the leading \"- \"".to_owned())),
            Value::Scalar { .. } => self.deserialize_any(visitor),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'n>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        let Some(Scalar::Text(text)) = self.scalar() else {
            return self.deserialize_any(visitor);
        };
        let variant: StrDeserializer<'_, DecodeError> = text.into_deserializer();
        visitor.visit_enum(variant).map_err(|error| error.or_line(self.node.line))
    }

    /// Reached for a field that its type does not have.
    fn deserialize_ignored_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        if let Some(Field { entry, within, known }) = self.field {
            let (line, field) = (entry.line, entry.key.to_string());
            self.unknown.borrow_mut().push(UnknownField { line, field, within, known });
        }
        visitor.visit_unit()
    }

    forward!(string: deserialize_str deserialize_string deserialize_char deserialize_identifier);
    forward!(bare: deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_f32 deserialize_f64);
    forward!(deserialize_any: deserialize_bytes deserialize_byte_buf deserialize_unit deserialize_seq
        deserialize_map);

    fn deserialize_unit_struct<V: Visitor<'n>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple<V: Visitor<'n>>(self, _len: usize, visitor: V) -> Result<V::Value, DecodeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'n>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_any(visitor)
    }
}

/// The items of a list, one after the other.
struct Items<'n, 'u> {
    items: std::iter::Enumerate<std::slice::Iter<'n, Arc<Node>>>,
    unknown: &'u RefCell<Vec<UnknownField>>,
}

impl<'n> SeqAccess<'n> for Items<'n, '_> {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'n>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, DecodeError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        seed.deserialize(Decoder { node, unknown: self.unknown, field: None })
            .map(Some)
            .map_err(|error| error.within(format!("[{index}]"), node.line))
    }
}

/// The entries of a mapping, one after the other.
struct Entries<'n, 'u> {
    entries: std::slice::Iter<'n, Entry>,
    /// The entry whose key was taken and whose value was not.
    taken: Option<&'n Entry>,
    unknown: &'u RefCell<Vec<UnknownField>>,
    within: &'static str,
    known: &'static [&'static str],
}

impl<'n, 'u> Entries<'n, 'u> {
    fn new(
        entries: &'n [Entry],
        unknown: &'u RefCell<Vec<UnknownField>>,
        within: &'static str,
        known: &'static [&'static str],
    ) -> Self {
        Self { entries: entries.iter(), taken: None, unknown, within, known }
    }
}

impl<'n> MapAccess<'n> for Entries<'n, '_> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'n>>(&mut self, seed: K) -> Result<Option<K::Value>, DecodeError> {
        self.taken = self.entries.next();
        let Some(entry) = self.taken else { return Ok(None) };
        let key: StrDeserializer<'_, DecodeError> = (*entry.key).into_deserializer();
        seed.deserialize(key).map(Some).map_err(|error| error.or_line(entry.line))
    }

    fn next_value_seed<V: DeserializeSeed<'n>>(&mut self, seed: V) -> Result<V::Value, DecodeError> {
        let Some(entry) = self.taken.take() else {
            return Err(DecodeError::custom("a value was asked for before its key"));
        };
        let field = Field { entry, within: self.within, known: self.known };
        seed.deserialize(Decoder { node: &entry.value, unknown: self.unknown, field: Some(field) })
            .map_err(|error| error.within(entry.key.to_string(), entry.line))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::core::v1::Service;

    use super::*;
    use crate::yaml::documents;

    fn service(text: &str) -> (Result<Service, DecodeError>, Vec<UnknownField>) {
        let unknown = RefCell::default();
        let result = decode(&documents(text).unwrap()[0], &unknown);
        (result, unknown.into_inner())
    }

    #[test]
    fn fields_that_a_type_does_not_have_are_written_down() {
        let (service, unknown) = service(
            "kind: Service\nmetadata:\n  name: a\n  labels: {any: thing}\nspec:\n  selektor:\n    app: a\n",
        );
        assert_eq!(service.unwrap().metadata.name.as_deref(), Some("a"));
        let [unknown] = &unknown[..] else { panic!("{unknown:?}") };
        assert_eq!((unknown.line, unknown.field.as_str(), unknown.within), (6, "selektor", "ServiceSpec"));
        assert!(unknown.known.contains(&"selector"));
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_line() {
        for (text, line, message, hint) in [
            (
                "spec:\n  ports:\n  - port: 80\n  - port: '81'\n",
                4,
                "spec.ports[1].port: expected a number, found the text \"81\"",
                "write 81 without quotes",
            ),
            (
                "spec:\n  selector:\n    version: 1.20\n",
                3,
                "spec.selector.version: expected a text, found the number 1.2",
                "write \"1.20\" in quotes",
            ),
            (
                "spec:\n- type: ClusterIP\n",
                2,
                "spec: expected a mapping, found a list",
                "remove the leading \"- \"",
            ),
        ] {
            let error = service(text).0.unwrap_err();
            assert_eq!((error.line, error.to_string().as_str(), error.hint.as_str()), (line, message, hint));
        }
    }

    #[test]
    fn types_are_named_in_plain_words() {
        for (spec, message) in [
            ("ports: 80", "spec.ports: expected a list, found the number 80"),
            ("ports: [80]", "spec.ports[0]: expected ServicePort, found the number 80"),
            ("selector: [a]", "spec.selector: expected a mapping, found a list"),
            (
                "publishNotReadyAddresses: 'true'",
                "spec.publishNotReadyAddresses: expected true or false, found the text \"true\"",
            ),
            ("type: {}", "spec.type: expected a text, found a mapping"),
            (
                "ports: [{port: 4294967296}]",
                "spec.ports[0].port: invalid value: integer `4294967296`, expected i32",
            ),
        ] {
            assert_eq!(service(&format!("spec: {{{spec}}}")).0.unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn scalars_are_what_the_core_schema_says() {
        let text = "a: 1\nb: -2\nc: 0x10\nd: 1.5\ne: true\nf: ~\ng: nan\nh: '1'\ni: +inf\nj: 1.2.3\n";
        let unknown = RefCell::default();
        let documents = documents(text).unwrap();
        let values: BTreeMap<String, serde_json::Value> = decode(&documents[0], &unknown).unwrap();
        let json = serde_json::to_string(&values).unwrap();
        assert_eq!(
            json,
            r#"{"a":1,"b":-2,"c":16,"d":1.5,"e":true,"f":null,"g":"nan","h":"1","i":"+inf","j":"1.2.3"}"#
        );
    }
}
