//! Reading a rules file: every mistake with its line and column, and what to write instead.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{
    Copies, EvictOrder, MAX_FILE_BYTES, MAX_RULES, OffloadRule, Rule, RuleError, RuleSet, Setting, TierSet, When,
    WriteWhen, reach,
};
use crate::semantic::SemanticType;
use crate::taint::parse_span;
use crate::tier::Tier;

/// Longest name, model or tenant pattern, in bytes.
const MAX_TEXT_BYTES: usize = 256;
/// Most copies on other nodes that can be asked for.
const MAX_COPIES: i64 = 4096;
const SPANS: &str = "write a number and a unit: \"500ms\", \"30s\", \"10m\", \"2h\" or \"7d\"";

/// Reads a file.
///
/// # Errors
/// Every mistake, in the order of the file.
pub fn parse(text: &str) -> Result<RuleSet, Vec<RuleError>> {
    let mut reader = Reader { text, errors: Vec::new() };
    let rules = reader.file();
    if reader.errors.is_empty() {
        let warnings = reach::unreachable(&rules);
        return Ok(RuleSet { rules, warnings });
    }
    reader.errors.sort_by_key(|e| (e.line, e.column));
    Err(reader.errors)
}

struct Reader<'a> {
    text: &'a str,
    errors: Vec<RuleError>,
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Reader<'_> {
    fn at(&self, offset: usize) -> (u32, u32) {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (u32::try_from(line).unwrap_or(u32::MAX), u32::try_from(column).unwrap_or(u32::MAX))
    }

    fn fail(&mut self, span: &Range<usize>, message: impl Into<String>) {
        let (line, column) = self.at(span.start);
        self.errors.push(RuleError { line, column, message: message.into() });
    }

    fn file(&mut self) -> Vec<Rule> {
        if self.text.len() > MAX_FILE_BYTES {
            self.fail(&(0..0), format!("the file is longer than {MAX_FILE_BYTES} bytes"));
            return Vec::new();
        }
        let text = self.text;
        let table = match DeTable::parse(text) {
            Ok(table) => table,
            Err(error) => {
                self.fail(&error.span().unwrap_or(0..0), format!("not TOML: {}", error.message()));
                return Vec::new();
            }
        };
        let mut rules = Vec::new();
        for (key, value) in table.get_ref() {
            if key.get_ref() != "rule" {
                self.unknown(&key.span(), key.get_ref(), &["rule"], "a rules file has [[rule]] tables only");
                continue;
            }
            let DeValue::Array(list) = value.get_ref() else {
                self.fail(&value.span(), "rule is a list of tables: write [[rule]]");
                continue;
            };
            for one in list {
                rules.extend(self.rule(one));
            }
        }
        self.check(&rules);
        rules.into_iter().map(|(rule, _)| rule).collect()
    }

    fn check(&mut self, rules: &[(Rule, Range<usize>)]) {
        if let Some((_, span)) = rules.get(MAX_RULES) {
            self.fail(span, format!("more than {MAX_RULES} rules"));
        }
        for (at, (rule, span)) in rules.iter().enumerate() {
            if let Some((first, _)) = rules[..at].iter().find(|(r, _)| r.name == rule.name && !rule.name.is_empty()) {
                let message = format!(
                    "the rule on line {} is called {:?} too: give each a name of its own",
                    first.line, rule.name
                );
                self.fail(span, message);
            }
        }
    }

    fn rule(&mut self, value: &Value<'_>) -> Option<(Rule, Range<usize>)> {
        let DeValue::Table(table) = value.get_ref() else {
            self.fail(&value.span(), "a rule is a table: write [[rule]]");
            return None;
        };
        let mut rule =
            Rule { name: String::new(), line: self.at(value.span().start).0, when: When::default(), then: Vec::new() };
        let mut name_span = value.span();
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "name" => {
                    name_span = value.span();
                    rule.name = self.string(value, "name").unwrap_or_default();
                }
                "when" => rule.when = self.when(value),
                "then" => rule.then = self.then(value),
                other => self.unknown(&key.span(), other, &["name", "when", "then"], "a rule has name, when and then"),
            }
        }
        let has = |field: &str| table.keys().any(|k| k.get_ref() == field);
        if !has("name") || (rule.name.is_empty() && self.errors.is_empty()) {
            self.fail(&value.span(), "a rule needs a name, which explanations use: write name = \"...\"");
        }
        if !has("then") {
            self.fail(&value.span(), "a rule needs something to say: write then = { priority = 90 }, for example");
        }
        Some((rule, name_span))
    }

    fn when(&mut self, value: &Value<'_>) -> When {
        let mut when = When::default();
        let DeValue::Table(table) = value.get_ref() else {
            self.fail(&value.span(), "when is a table: write when = { type = \"TOOL_RESULT\" }");
            return when;
        };
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "type" => {
                    when.types = self.strings(value, "type").into_iter().filter_map(|v| self.semantic(v)).collect()
                }
                "taint" => {
                    if let Some(text) = self.string(value, "taint") {
                        match text.parse() {
                            Ok(taint) => when.taint = Some(taint),
                            Err(error) => self.fail(&value.span(), error.to_string()),
                        }
                    }
                }
                "model" => when.model = self.string(value, "model"),
                "tenant" => when.tenant = self.string(value, "tenant"),
                other => {
                    let known = ["type", "taint", "model", "tenant"];
                    self.unknown(&key.span(), other, &known, "when has type, taint, model and tenant");
                }
            }
        }
        when
    }

    fn semantic(&mut self, value: &Value<'_>) -> Option<SemanticType> {
        let DeValue::String(text) = value.get_ref() else { return None };
        let name = text.to_ascii_uppercase().replace('-', "_");
        let known = name.parse().ok();
        if known.is_none() {
            let names = SemanticType::ALL.map(SemanticType::name);
            self.unknown(&value.span(), &name, &names, &format!("types are {}", names.join(", ")));
        }
        known
    }

    fn then(&mut self, value: &Value<'_>) -> Vec<Setting> {
        let DeValue::Table(table) = value.get_ref() else {
            self.fail(&value.span(), "then is a table: write then = { priority = 90 }");
            return Vec::new();
        };
        if table.is_empty() {
            self.fail(&value.span(), "then is empty: the rule says nothing");
        }
        let mut settings = Vec::new();
        for (key, value) in table {
            let setting = match key.get_ref().as_ref() {
                "tiers" => self.tiers(value, "tiers", Tier::Host).map(Setting::Tiers),
                "offload" => self.offload(value).map(Setting::Offload),
                "replicate" => self.copies(value).map(Setting::Replicate),
                "ttl" => self.span(value).map(Setting::Ttl),
                "priority" => {
                    self.number(value, "priority", 100).and_then(|n| u8::try_from(n).ok()).map(Setting::Priority)
                }
                "pin" => self.flag(value).map(Setting::Pin),
                "evict" => {
                    let choices = [("first", EvictOrder::First), ("normal", EvictOrder::Normal)];
                    self.choice(value, "evict", choices).map(Setting::Evict)
                }
                "write_behind" => {
                    let choices = [("read", WriteWhen::Read), ("all", WriteWhen::All), ("none", WriteWhen::Nothing)];
                    self.choice(value, "write_behind", choices).map(Setting::WriteBehind)
                }
                other => {
                    let all = format!("then has {}", Setting::FIELDS.join(", "));
                    self.unknown(&key.span(), other, &Setting::FIELDS, &all);
                    None
                }
            };
            settings.extend(setting);
        }
        settings
    }

    fn offload(&mut self, value: &Value<'_>) -> Option<OffloadRule> {
        if let DeValue::String(text) = value.get_ref() {
            if text.as_ref() == "never" {
                return Some(OffloadRule::Never);
            }
            self.fail(
                &value.span(),
                format!("offload is {text:?}: write \"never\", or a list of \"disk\" and \"object\""),
            );
            return None;
        }
        let tiers = self.tier_list(value, "offload")?;
        let slower = Tier::ALL.into_iter().filter(|t| tiers.has(*t) && !matches!(t, Tier::Disk | Tier::Object));
        if slower.count() > 0 {
            self.fail(&value.span(), "offload names slower tiers: \"disk\" and \"object\"");
            return None;
        }
        Some(OffloadRule::To(tiers))
    }

    fn tiers(&mut self, value: &Value<'_>, field: &str, needed: Tier) -> Option<TierSet> {
        let tiers = self.tier_list(value, field)?;
        if !tiers.has(needed) {
            let message = format!("{field} must have {:?}: that is where engines write", needed.name());
            self.fail(&value.span(), message);
            return None;
        }
        Some(tiers)
    }

    fn tier_list(&mut self, value: &Value<'_>, field: &str) -> Option<TierSet> {
        let before = self.errors.len();
        let mut tiers = TierSet::default();
        for one in self.strings(value, field) {
            let DeValue::String(text) = one.get_ref() else { continue };
            match text.parse() {
                Ok(tier) => tiers = tiers.with(tier),
                Err(_) => {
                    let names = Tier::ALL.map(Tier::name);
                    self.unknown(&one.span(), text, &names, "tiers are device, host, disk and object");
                }
            }
        }
        (self.errors.len() == before).then_some(tiers)
    }

    fn copies(&mut self, value: &Value<'_>) -> Option<Copies> {
        match value.get_ref() {
            DeValue::String(text) if text.as_ref() == "all" => Some(Copies::All),
            DeValue::Integer(_) => {
                let count = self.number(value, "replicate", MAX_COPIES)?;
                u16::try_from(count).ok().map(Copies::Some)
            }
            _ => {
                self.fail(&value.span(), "replicate is the number of copies on other nodes, or \"all\"");
                None
            }
        }
    }

    fn span(&mut self, value: &Value<'_>) -> Option<std::time::Duration> {
        let DeValue::String(text) = value.get_ref() else {
            self.fail(&value.span(), format!("ttl is a span: {SPANS}"));
            return None;
        };
        let span = parse_span(text).filter(|s| !s.is_zero());
        if span.is_none() {
            self.fail(&value.span(), format!("ttl {text:?} is no span above zero: {SPANS}"));
        }
        span
    }

    fn number(&mut self, value: &Value<'_>, field: &str, max: i64) -> Option<i64> {
        let number = match value.get_ref() {
            DeValue::Integer(n) if n.radix() == 10 => n.as_str().parse::<i64>().ok(),
            _ => None,
        };
        let number = number.filter(|n| (0..=max).contains(n));
        if number.is_none() {
            self.fail(&value.span(), format!("{field} is a number from 0 to {max}"));
        }
        number
    }

    fn flag(&mut self, value: &Value<'_>) -> Option<bool> {
        if let DeValue::Boolean(flag) = value.get_ref() {
            return Some(*flag);
        }
        self.fail(&value.span(), "pin is true or false, without quotes");
        None
    }

    fn choice<T, const N: usize>(&mut self, value: &Value<'_>, field: &str, choices: [(&str, T); N]) -> Option<T> {
        let names = choices.each_ref().map(|(name, _)| *name);
        let said = format!("{field} is one of {}", names.map(|n| format!("{n:?}")).join(", "));
        let DeValue::String(text) = value.get_ref() else {
            self.fail(&value.span(), said);
            return None;
        };
        let found = choices.into_iter().find(|(name, _)| *name == text.as_ref()).map(|(_, choice)| choice);
        if found.is_none() {
            self.unknown(&value.span(), text, &names, &said);
        }
        found
    }

    fn string(&mut self, value: &Value<'_>, field: &str) -> Option<String> {
        match value.get_ref() {
            DeValue::String(text) if text.len() <= MAX_TEXT_BYTES => Some(text.to_string()),
            DeValue::String(_) => {
                self.fail(&value.span(), format!("{field} is longer than {MAX_TEXT_BYTES} bytes"));
                None
            }
            _ => {
                self.fail(&value.span(), format!("{field} is a text: put it in quotes"));
                None
            }
        }
    }

    /// One text, or a list of texts.
    fn strings<'v, 'i>(&mut self, value: &'v Value<'i>, field: &str) -> Vec<&'v Value<'i>> {
        let list: Vec<&Value<'_>> = match value.get_ref() {
            DeValue::Array(list) => list.iter().collect(),
            DeValue::String(_) => vec![value],
            _ => {
                self.fail(&value.span(), format!("{field} is a text or a list of texts"));
                return Vec::new();
            }
        };
        if let Some(bad) = list.iter().find(|v| !matches!(v.get_ref(), DeValue::String(_))) {
            self.fail(&bad.span(), format!("{field} has texts only: put each in quotes"));
        }
        if list.is_empty() {
            self.fail(&value.span(), format!("{field} is empty: leave it out, or name something"));
        }
        list
    }

    fn unknown(&mut self, span: &Range<usize>, word: &str, known: &[&str], all: &str) {
        let near = known.iter().map(|k| (distance(word, k), *k)).min();
        let meant = near.filter(|(far, k)| *far <= k.len() / 3).map(|(_, k)| format!("; did you mean {k:?}?"));
        self.fail(span, format!("unknown {word:?}{}; {all}", meant.unwrap_or_default()).replace("?;", "?"));
    }
}

/// Letters to change, add or drop to get from one word to another (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = corner + usize::from(from != *to);
            corner = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}
