//! The policy file: TOML in, a checked [`Policy`] and [`Finding`]s with line numbers out.
//!
//! TOML because people write and review these rules: comments, no indentation to get wrong, and a parser that keeps
//! the place of every value, on every Python, without a Python package. The same shape as JSON Schema ships with the
//! Python package (`agentrt/safety/policy.schema.json`).

use std::collections::HashMap;

use regex::Regex;
use toml_span::value::{Table, ValueInner};
use toml_span::Span;

use crate::names::normalise;

/// What a rule does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The call runs.
    Allow,
    /// It does not.
    Deny,
    /// Someone is asked.
    Ask,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The policy is refused.
    Error,
    /// The policy works, but hardly as meant.
    Warning,
}

/// Something about a policy file, with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Line, from 1.
    pub line: usize,
    /// Column in bytes, from 1.
    pub column: usize,
    /// Error or warning.
    pub severity: Severity,
    /// Stable short name, such as `shadowed`.
    pub code: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

/// A test on one argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// The text, or one of several.
    OneOf(Vec<String>),
    /// `*` and `?` over text.
    Glob(String),
    /// `*`, `**` and `?` over a normalised path.
    Path(String),
    /// A regular expression.
    Regex(String),
    /// At least this number.
    Min(f64),
    /// At most this number.
    Max(f64),
    /// At most this many characters.
    MaxLength(usize),
    /// The argument is there, or is not.
    Present(bool),
}

/// A test and the argument it is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Dotted, normalised path; `*` stands for anything.
    pub key: String,
    /// What must hold.
    pub test: Test,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Name in logs.
    pub id: String,
    /// What happens to a call that matches.
    pub effect: Effect,
    /// Name patterns of tools, normalised.
    pub tools: Vec<String>,
    /// Name patterns of agents, normalised; empty: any.
    pub agents: Vec<String>,
    /// Name patterns of sessions, normalised; empty: any.
    pub sessions: Vec<String>,
    /// The call's context carries one of these labels; empty: does not matter.
    pub labels_any: Vec<String>,
    /// It carries none of these.
    pub labels_none: Vec<String>,
    /// All must hold.
    pub conditions: Vec<Condition>,
    /// Arguments without a condition are not accepted.
    pub strict_args: bool,
    /// For people.
    pub reason: String,
    /// Line of the rule.
    pub line: usize,
    /// Column of the rule.
    pub column: usize,
}

/// One declared tool.
#[derive(Clone, Debug)]
pub struct Tool {
    /// Name, normalised.
    pub name: String,
    /// Other names it goes by, normalised.
    pub aliases: Vec<String>,
    /// Can do harm: needs an `allow` rule, and takes no taint it does not accept.
    pub privileged: bool,
    /// Labels that may flow into it.
    pub accepts: Vec<String>,
    /// Labels its results carry.
    pub adds: Vec<String>,
    /// Line of the declaration.
    pub line: usize,
}

/// A tool whose results lose labels.
#[derive(Clone, Debug)]
pub struct Sanitiser {
    /// The tool, normalised.
    pub tool: String,
    /// Labels it removes.
    pub removes: Vec<String>,
}

/// A policy file, parsed and free of errors.
#[derive(Clone, Debug)]
pub struct Policy {
    /// For declared, unprivileged tools that no rule decides.
    pub default: Effect,
    /// Labels that are no taint.
    pub trusted: Vec<String>,
    /// Declared tools.
    pub tools: Vec<Tool>,
    /// Rules in order.
    pub rules: Vec<Rule>,
    /// Sanitisers.
    pub sanitisers: Vec<Sanitiser>,
}

struct Reader<'a> {
    text: &'a str,
    findings: Vec<Finding>,
}

type Fields<'a, 'de> = Vec<(&'a str, Span, &'a toml_span::Value<'de>)>;

impl Reader<'_> {
    fn place(&self, at: usize) -> (usize, usize) {
        let before = &self.text[..at.min(self.text.len())];
        (before.matches('\n').count() + 1, at - before.rfind('\n').map_or(0, |n| n + 1) + 1)
    }

    fn error(&mut self, span: Span, code: &'static str, message: impl Into<String>) {
        let (line, column) = self.place(span.start);
        self.findings.push(Finding { line, column, severity: Severity::Error, code, message: message.into() });
    }

    fn fields<'a, 'de>(&mut self, table: &'a Table<'de>, known: &[&str]) -> Fields<'a, 'de> {
        let mut fields: Fields<'a, 'de> = table.iter().map(|(k, v)| (k.name.as_ref(), k.span, v)).collect();
        fields.sort_by_key(|(_, span, _)| span.start);
        for &(name, span, _) in &fields {
            if !known.is_empty() && !known.contains(&name) {
                self.error(span, "unknown-key", format!("unknown key {name:?}; known are: {}", known.join(", ")));
            }
        }
        fields
    }

    fn wrong(&mut self, value: &toml_span::Value<'_>, name: &str, wanted: &str) {
        let found = value.as_ref().type_str();
        self.error(value.span, "type", format!("{name} must be {wanted}, found: {found}"));
    }

    fn table<'a, 'de>(&mut self, value: &'a toml_span::Value<'de>, name: &str) -> Option<&'a Table<'de>> {
        let table = value.as_table();
        if table.is_none() {
            self.wrong(value, name, "a table");
        }
        table
    }

    fn string(&mut self, value: &toml_span::Value<'_>, name: &str) -> String {
        if let Some(text) = value.as_str() {
            return text.to_owned();
        }
        self.wrong(value, name, "a string");
        String::new()
    }

    fn bool(&mut self, value: &toml_span::Value<'_>, name: &str) -> bool {
        value.as_bool().unwrap_or_else(|| {
            self.wrong(value, name, "true or false");
            false
        })
    }

    fn number(&mut self, value: &toml_span::Value<'_>, name: &str) -> f64 {
        value.as_float().or_else(|| value.as_integer().map(|n| n as f64)).unwrap_or_else(|| {
            self.wrong(value, name, "a number");
            0.0
        })
    }

    fn strings(&mut self, value: &toml_span::Value<'_>, name: &str) -> Vec<String> {
        let Some(items) = value.as_array() else {
            self.wrong(value, name, "a list of strings");
            return Vec::new();
        };
        if items.is_empty() {
            self.error(value.span, "empty", format!("{name} matches nothing when empty; leave it out for: any"));
        }
        items.iter().map(|item| self.string(item, name)).collect()
    }

    fn names(&mut self, value: &toml_span::Value<'_>, name: &str) -> Vec<String> {
        self.strings(value, name).iter().map(|n| normalise(n)).collect()
    }

    fn labels(&mut self, value: &toml_span::Value<'_>, name: &str) -> Vec<String> {
        if value.as_array().is_some_and(Vec::is_empty) {
            return Vec::new();
        }
        self.strings(value, name)
    }

    fn effect(&mut self, value: &toml_span::Value<'_>, name: &str) -> Effect {
        match value.as_str() {
            Some("allow") => Effect::Allow,
            Some("deny") => Effect::Deny,
            Some("ask") => Effect::Ask,
            _ => {
                self.error(value.span, "type", format!("{name} must be one of: allow, deny, ask"));
                Effect::Deny
            }
        }
    }

    fn tests(&mut self, key: &str, value: &toml_span::Value<'_>) -> Vec<Condition> {
        let mut conditions = Vec::new();
        let Some(table) = self.table(value, &format!("args.{key}")) else {
            return conditions;
        };
        let known = ["equals", "one_of", "glob", "path", "regex", "min", "max", "max_length", "present"];
        for (name, _, value) in self.fields(table, &known) {
            let test = match name {
                "equals" => Test::OneOf(vec![self.scalar(value, "equals")]),
                "one_of" => match value.as_array() {
                    Some(items) if !items.is_empty() => {
                        Test::OneOf(items.iter().map(|item| self.scalar(item, "one_of")).collect())
                    }
                    _ => {
                        self.wrong(value, "one_of", "a list of at least one value");
                        continue;
                    }
                },
                "glob" => Test::Glob(self.string(value, "glob")),
                "path" => Test::Path(self.string(value, "path")),
                "regex" => {
                    let pattern = self.string(value, "regex");
                    if let Err(error) = Regex::new(&format!("^(?:{pattern})$")) {
                        let last = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
                        self.error(value.span, "regex", format!("regular expression: {last}"));
                        continue;
                    }
                    Test::Regex(pattern)
                }
                "min" => Test::Min(self.number(value, "min")),
                "max" => Test::Max(self.number(value, "max")),
                "max_length" => Test::MaxLength(self.number(value, "max_length").max(0.0) as usize),
                "present" => Test::Present(self.bool(value, "present")),
                _ => continue,
            };
            conditions.push(Condition { key: normalise(key), test });
        }
        let low = conditions.iter().find_map(|c| if let Test::Min(x) = c.test { Some(x) } else { None });
        let high = conditions.iter().find_map(|c| if let Test::Max(x) = c.test { Some(x) } else { None });
        if let (Some(low), Some(high)) = (low, high) {
            if low > high {
                self.error(value.span, "unreachable", format!("no number is at least {low} and at most {high}"));
            }
        }
        if conditions.is_empty() {
            self.error(value.span, "empty", format!("args.{key} has no test"));
        }
        conditions
    }

    fn scalar(&mut self, value: &toml_span::Value<'_>, name: &str) -> String {
        match value.as_ref() {
            ValueInner::String(s) => s.to_string(),
            ValueInner::Integer(n) => n.to_string(),
            ValueInner::Float(x) => x.to_string(),
            ValueInner::Boolean(b) => b.to_string(),
            _ => {
                self.wrong(value, name, "a string, number or truth value");
                String::new()
            }
        }
    }

    fn tool(&mut self, name: &str, span: Span, value: &toml_span::Value<'_>) -> Option<Tool> {
        let table = self.table(value, &format!("tools.{name}"))?;
        let mut tool = Tool {
            name: normalise(name),
            aliases: Vec::new(),
            privileged: true,
            accepts: Vec::new(),
            adds: Vec::new(),
            line: self.place(span.start).0,
        };
        for (key, _, value) in self.fields(table, &["privileged", "aliases", "accepts", "adds", "description"]) {
            match key {
                "privileged" => tool.privileged = self.bool(value, "privileged"),
                "aliases" => tool.aliases = self.names(value, "aliases"),
                "accepts" => tool.accepts = self.labels(value, "accepts"),
                "adds" => tool.adds = self.labels(value, "adds"),
                "description" => {
                    self.string(value, "description");
                }
                _ => {}
            }
        }
        Some(tool)
    }

    fn rule(&mut self, value: &toml_span::Value<'_>) -> Option<(Rule, Span)> {
        let table = self.table(value, "rules")?;
        let known = ["id", "effect", "tools", "agents", "sessions", "labels", "args", "strict_args", "reason"];
        // A table of an array starts where its first key does; its own span may be the header or empty.
        let fields = self.fields(table, &known);
        let at = fields.first().map_or(value.span, |(_, span, _)| *span);
        let (line, column) = self.place(at.start);
        let mut rule = Rule {
            id: String::new(),
            effect: Effect::Deny,
            tools: Vec::new(),
            agents: Vec::new(),
            sessions: Vec::new(),
            labels_any: Vec::new(),
            labels_none: Vec::new(),
            conditions: Vec::new(),
            strict_args: false,
            reason: String::new(),
            line,
            column,
        };
        for required in ["id", "effect", "tools"] {
            if !fields.iter().any(|(name, _, _)| *name == required) {
                self.error(at, "missing-key", format!("a rule needs: {required}"));
            }
        }
        for (key, span, value) in fields {
            match key {
                "id" => rule.id = self.string(value, "id"),
                "effect" => rule.effect = self.effect(value, "effect"),
                "tools" => rule.tools = self.names(value, "tools"),
                "agents" => rule.agents = self.names(value, "agents"),
                "sessions" => rule.sessions = self.names(value, "sessions"),
                "labels" => {
                    let Some(table) = self.table(value, "labels") else {
                        continue;
                    };
                    for (key, _, value) in self.fields(table, &["any", "none"]) {
                        match key {
                            "any" => rule.labels_any = self.strings(value, "labels.any"),
                            "none" => rule.labels_none = self.strings(value, "labels.none"),
                            _ => {}
                        }
                    }
                    if let Some(both) = rule.labels_any.iter().find(|l| rule.labels_none.contains(l)) {
                        if rule.labels_any.len() == 1 {
                            self.error(span, "unreachable", format!("asked for and excluded: {both:?}"));
                        }
                    }
                }
                "args" => {
                    let Some(table) = self.table(value, "args") else {
                        continue;
                    };
                    for (key, _, value) in self.fields(table, &[]) {
                        let found = self.tests(key, value);
                        rule.conditions.extend(found);
                    }
                }
                "strict_args" => rule.strict_args = self.bool(value, "strict_args"),
                "reason" => rule.reason = self.string(value, "reason"),
                _ => {}
            }
        }
        if rule.strict_args && rule.effect != Effect::Allow {
            self.error(at, "strict-args", "strict_args narrows a rule, so it belongs to effect: allow");
        }
        Some((rule, at))
    }
}

/// Whether the label `label` is meant by `pattern`: itself or a kind of it (`web:news` is a `web`).
pub fn label_matches(pattern: &str, label: &str) -> bool {
    label.strip_prefix(pattern).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

/// Whether `name` matches a pattern of names with `*`.
pub fn name_matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut last = None;
    for piece in pieces {
        if let Some(piece) = last.replace(piece) {
            match rest.find(piece) {
                Some(at) => rest = &rest[at + piece.len()..],
                None => return false,
            }
        }
    }
    match last {
        None => rest.is_empty(),
        Some(last) => rest.ends_with(last),
    }
}

impl Policy {
    /// Reads a policy. With an error among the findings there is none.
    pub fn parse(text: &str) -> (Option<Policy>, Vec<Finding>) {
        let mut reader = Reader { text, findings: Vec::new() };
        let root = match toml_span::parse(text) {
            Ok(root) => root,
            Err(error) => {
                reader.error(error.span, "toml", format!("not TOML: {error}"));
                return (None, reader.findings);
            }
        };
        let mut policy = Policy {
            default: Effect::Deny,
            trusted: Vec::new(),
            tools: Vec::new(),
            rules: Vec::new(),
            sanitisers: Vec::new(),
        };
        let Some(table) = root.as_table() else {
            return (None, reader.findings);
        };
        let fields = reader.fields(table, &["version", "default", "trusted", "tools", "rules", "sanitisers"]);
        if !fields.iter().any(|(name, _, _)| *name == "version") {
            reader.error(Span::new(0, 0), "missing-key", "a policy starts with: version = 1");
        }
        let mut sanitiser_spans = Vec::new();
        let mut rule_spans = Vec::new();
        for (name, span, value) in fields {
            match name {
                "version" if value.as_integer() != Some(1) => {
                    reader.error(value.span, "version", "this release reads: version = 1");
                }
                "default" => policy.default = reader.effect(value, "default"),
                "trusted" => policy.trusted = reader.labels(value, "trusted"),
                "tools" => {
                    let Some(table) = reader.table(value, "tools") else {
                        continue;
                    };
                    for (name, span, value) in reader.fields(table, &[]) {
                        let tool = reader.tool(name, span, value);
                        policy.tools.extend(tool);
                    }
                }
                "rules" => match value.as_array() {
                    None => reader.wrong(value, "rules", "a list of tables: [[rules]]"),
                    Some(items) => {
                        for item in items {
                            if let Some((rule, at)) = reader.rule(item) {
                                policy.rules.push(rule);
                                rule_spans.push(at);
                            }
                        }
                    }
                },
                "sanitisers" => match value.as_array() {
                    None => reader.wrong(value, "sanitisers", "a list of tables: [[sanitisers]]"),
                    Some(items) => {
                        for item in items {
                            let Some(table) = reader.table(item, "sanitisers") else {
                                continue;
                            };
                            let mut sanitiser = Sanitiser { tool: String::new(), removes: Vec::new() };
                            for (key, _, value) in reader.fields(table, &["tool", "removes"]) {
                                match key {
                                    "tool" => {
                                        sanitiser.tool = normalise(&reader.string(value, "tool"));
                                    }
                                    "removes" => {
                                        sanitiser.removes = reader.strings(value, "removes");
                                    }
                                    _ => {}
                                }
                            }
                            sanitiser_spans.push(span);
                            policy.sanitisers.push(sanitiser);
                        }
                    }
                },
                _ => {}
            }
        }
        policy.check_names(&mut reader, &rule_spans, &sanitiser_spans);
        let failed = reader.findings.iter().any(|f| f.severity == Severity::Error);
        reader.findings.sort_by_key(|f| (f.line, f.column));
        ((!failed).then_some(policy), reader.findings)
    }

    fn check_names(&self, reader: &mut Reader<'_>, rule_spans: &[Span], sanitiser_spans: &[Span]) {
        let mut owners: HashMap<String, &str> = HashMap::new();
        for tool in &self.tools {
            for name in std::iter::once(&tool.name).chain(&tool.aliases) {
                let key = crate::names::skeleton(name);
                if let Some(other) = owners.insert(key, &tool.name) {
                    let message = format!("{name:?} is, or looks like, another name of: {other}");
                    reader.findings.push(Finding {
                        line: tool.line,
                        column: 1,
                        severity: Severity::Error,
                        code: "duplicate-tool",
                        message,
                    });
                }
            }
        }
        let mut ids: HashMap<&str, usize> = HashMap::new();
        for (rule, &span) in self.rules.iter().zip(rule_spans) {
            if let Some(line) = ids.insert(&rule.id, rule.line) {
                reader.error(span, "duplicate-id", format!("rule id {:?} is taken by line: {line}", rule.id));
            }
            for pattern in &rule.tools {
                if !self.tools.iter().any(|tool| tool.is_meant_by(pattern)) {
                    let message = format!("no declared tool is meant by {pattern:?}; add [tools.{pattern}]");
                    reader.error(span, "unknown-tool", message);
                }
            }
        }
        let distinct = self.label_patterns().len();
        if distinct > 64 {
            let span = rule_spans.last().copied().unwrap_or(Span::new(0, 0));
            reader.error(span, "too-many-labels", format!("at most 64 distinct labels in rules, found: {distinct}"));
        }
        for (sanitiser, &span) in self.sanitisers.iter().zip(sanitiser_spans) {
            if !self.tools.iter().any(|tool| tool.name == sanitiser.tool) {
                reader.error(span, "unknown-tool", format!("sanitiser is no declared tool: {:?}", sanitiser.tool));
            }
            if sanitiser.removes.is_empty() {
                reader.error(span, "missing-key", "a sanitiser needs: removes");
            }
        }
    }

    /// Distinct label patterns that rules mention.
    pub fn label_patterns(&self) -> Vec<&str> {
        let mut patterns: Vec<&str> =
            self.rules.iter().flat_map(|r| r.labels_any.iter().chain(&r.labels_none)).map(String::as_str).collect();
        patterns.sort_unstable();
        patterns.dedup();
        patterns
    }
}

impl Tool {
    /// Whether a pattern of a rule means this tool, by name or alias.
    pub fn is_meant_by(&self, pattern: &str) -> bool {
        std::iter::once(&self.name).chain(&self.aliases).any(|name| name_matches(pattern, name))
    }
}
