use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::pattern::Named;
use super::{PartSettings, Parts};

/// The settings that matter here, of all that are in a text.
///
/// # Errors
/// Which setting is wrong, and how, or that the text is no JSON object.
pub(super) fn parse(text: &str) -> Result<Parts, String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parts = deserializer.deserialize_map(Settings).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(parts)
}

/// Settings, each perhaps with the name of a part before it. What is not known is left out: trainers have plenty.
struct Settings;

impl<'de> Visitor<'de> for Settings {
    type Value = Parts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of settings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts, A::Error> {
        let mut parts = Parts::new();
        while let Some(key) = map.next_key::<String>()? {
            let (part, setting) = key.rsplit_once('.').unwrap_or(("", &key));
            if !PartSettings::has(setting) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let part = parts.entry(part.to_owned()).or_default();
            part.read(setting, &mut map).map_err(|error| A::Error::custom(format!("{setting}: {error}")))?;
        }
        Ok(parts)
    }
}

impl PartSettings {
    fn has(setting: &str) -> bool {
        let known = ["peft_type", "lora_alpha", "alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora"];
        known.contains(&setting)
    }

    fn read<'de, A: MapAccess<'de>>(&mut self, setting: &str, map: &mut A) -> Result<(), A::Error> {
        let ranks = |rank: f64| match rank > 0.0 {
            true => Ok(rank),
            false => Err(A::Error::custom(format!("{rank} is no rank"))),
        };
        match setting {
            "peft_type" => self.kind = map.next_value()?,
            // Whichever kind it is has one of them.
            "lora_alpha" | "alpha" => self.alpha = map.next_value::<Option<f64>>()?.or(self.alpha),
            "r" => self.rank = map.next_value::<Option<f64>>()?.map(ranks).transpose()?,
            "alpha_pattern" => self.alphas = named(map.next_value()?)?,
            "rank_pattern" => {
                self.ranks = named(map.next_value()?)?;
                self.ranks.iter().try_for_each(|named| ranks(named.value).map(drop))?;
            }
            "use_rslora" => self.by_root = map.next_value::<Option<bool>>()?.unwrap_or(false),
            _ => _ = map.next_value::<IgnoredAny>()?,
        }
        Ok(())
    }
}

fn named<E: Error>(pairs: Option<Pairs>) -> Result<Vec<Named>, E> {
    let pairs = pairs.map_or_else(Vec::new, |Pairs(pairs)| pairs);
    Named::all(pairs).map_err(E::custom)
}

/// Numbers by name, in their order: the first name that fits a layer counts.
struct Pairs(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("numbers by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
