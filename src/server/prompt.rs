//! The four forms of a prompt: a text, texts, token ids, lists of token ids.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// The prompts of a request, as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prompts(pub Vec<Vec<u8>>);

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a list of texts, a list of token ids, or a list of such lists")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![text.as_bytes().to_vec()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        let mut prompts = Vec::new();
        let mut ids = Vec::new();
        while let Some(element) = list.next_element()? {
            match element {
                Element::Id(byte) => ids.push(byte),
                Element::Prompt(prompt) => prompts.push(prompt),
            }
        }
        match (prompts.is_empty(), ids.is_empty()) {
            (false, true) => Ok(Prompts(prompts)),
            (true, false) => Ok(Prompts(vec![ids])),
            (true, true) => Err(A::Error::custom("`prompt` is an empty list")),
            (false, false) => Err(A::Error::custom("`prompt` mixes token ids with prompts")),
        }
    }
}

/// A member of the list.
enum Element {
    Id(u8),
    Prompt(Vec<u8>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a token id from 0 to 255, or a list of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Prompt(text.as_bytes().to_vec()))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
        u8::try_from(id).map(Element::Id).map_err(|_| {
            E::custom(format!(
                "token id {id}: ids are the values of bytes, 0 to 255"
            ))
        })
    }

    fn visit_i64<E: Error>(self, id: i64) -> Result<Element, E> {
        Err(E::custom(format!(
            "token id {id}: ids are the values of bytes, 0 to 255"
        )))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = list.next_element::<u64>()? {
            let id = u8::try_from(id).map_err(|_| {
                A::Error::custom(format!(
                    "token id {id}: ids are the values of bytes, 0 to 255"
                ))
            })?;
            ids.push(id);
        }
        Ok(Element::Prompt(ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_forms() {
        for (json, prompts) in [
            (r#""a\u00e9""#, vec![b"a\xc3\xa9".to_vec()]),
            (r#""""#, vec![vec![]]),
            (r#"["a", ""]"#, vec![b"a".to_vec(), vec![]]),
            ("[0, 255]", vec![vec![0, 255]]),
            ("[[1], [], [2, 3]]", vec![vec![1], vec![], vec![2, 3]]),
        ] {
            let parsed: Prompts = serde_json::from_str(json).expect(json);
            assert_eq!(parsed.0, prompts, "{json}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_a_reason() {
        for (json, words) in [
            ("[]", "empty list"),
            ("[1, \"a\"]", "mixes"),
            ("[[1], 2]", "mixes"),
            ("[256]", "token id 256"),
            ("[-1]", "token id -1"),
            ("[[300]]", "token id 300"),
            ("[1.5]", "floating point"),
            ("[[[1]]]", "invalid type"),
            ("{}", "a text, a list of texts"),
            ("null", "null"),
            ("7", "invalid type"),
        ] {
            let error = serde_json::from_str::<Prompts>(json).expect_err(json);
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
    }
}
