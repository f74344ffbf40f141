//! Deciding: rules compiled per tool, matched in file order.
//!
//! At construction every rule is filed under each tool it means, so a decision looks at the rules of one tool only.
//! Their argument tests are grouped by (argument, reading, kind); each group is one `RegexSet`, so all patterns of a
//! group are matched in one pass over a value, not one after the other.

use std::collections::HashMap;

use regex::{RegexSet, RegexSetBuilder};

use crate::names::{normalise, skeleton};
use crate::policy::{label_matches, name_matches, Condition, Effect, Policy, Rule, Test};
use crate::views::{leaves, path_views, views, Leaf, Reading, Value};

/// Why a call was decided as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A rule matched.
    Rule,
    /// No rule did, and the tool is not privileged: the policy's default.
    Default,
    /// No rule did, and the tool is privileged.
    Privileged,
    /// The tool is not declared.
    UnknownTool,
    /// The tool is not declared, and looks like one that is.
    LookAlike,
    /// A rule allowed it, but the context carries a taint that the tool does not accept.
    Taint,
    /// The arguments cannot be looked through.
    TooComplex,
}

/// The outcome of [`RuleSet::decide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub effect: Effect,
    /// Index of the rule that matched, if one did.
    pub rule: Option<usize>,
    /// Why.
    pub reason: Reason,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Text,
    Path,
}

/// Patterns over one argument in one reading.
struct Group {
    key: String,
    reading: Reading,
    kind: Kind,
    set: RegexSet,
    /// Test of the tool that pattern `i` belongs to.
    tests: Vec<usize>,
}

/// A [`Group`] in the making.
struct Patterns {
    key: String,
    reading: Reading,
    kind: Kind,
    regexes: Vec<String>,
    tests: Vec<usize>,
}

/// A test that is no pattern.
struct Plain {
    key: String,
    reading: Reading,
    test: Test,
    index: usize,
}

/// A name pattern, prepared: most have no star.
enum Name {
    Exact(String),
    Pattern(String),
}

impl Name {
    fn all(patterns: &[String]) -> Vec<Self> {
        let prepare = |p: &String| {
            if p.contains('*') {
                Self::Pattern(p.clone())
            } else {
                Self::Exact(p.clone())
            }
        };
        patterns.iter().map(prepare).collect()
    }

    /// Whether one of `names` matches; none at all stands for any name.
    fn any(names: &[Self], name: &str) -> bool {
        let matches = |pattern: &Self| match pattern {
            Self::Exact(exact) => exact == name,
            Self::Pattern(pattern) => name_matches(pattern, name),
        };
        names.is_empty() || names.iter().any(matches)
    }
}

struct Filed {
    rule: usize,
    agents: Vec<Name>,
    sessions: Vec<Name>,
    any: u64,
    none: u64,
    /// Tests of the tool that must hold.
    tests: Vec<usize>,
}

struct CompiledTool {
    privileged: bool,
    accepts: Vec<String>,
    rules: Vec<Filed>,
    groups: Vec<Group>,
    plain: Vec<Plain>,
    n_tests: usize,
}

/// A policy ready to decide.
pub struct RuleSet {
    policy: Policy,
    tools: Vec<CompiledTool>,
    by_name: HashMap<String, usize>,
    by_skeleton: HashMap<String, usize>,
    labels: Vec<String>,
}

fn glob_pattern(glob: &str, path: bool) -> String {
    let mut out = String::from("^(?s:");
    let body = if path { glob.strip_suffix("/**").unwrap_or(glob) } else { glob };
    let mut rest = body.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '*' if path && rest.peek() == Some(&'*') => {
                rest.next();
                // `a/**/b` also means `a/b`.
                if rest.peek() == Some(&'/') && out.ends_with('/') {
                    rest.next();
                    out.push_str("(?:.*/)?");
                } else {
                    out.push_str(".*");
                }
            }
            '*' => out.push_str(if path { "[^/]*" } else { ".*" }),
            '?' => out.push_str(if path { "[^/]" } else { "." }),
            _ => out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    if body.len() < glob.len() {
        out.push_str("(?:/.*)?");
    }
    out + ")$"
}

/// The regular expression of a test on text or paths.
fn pattern(test: &Test, reading: Reading) -> Option<(Kind, String)> {
    let case = if reading == Reading::Generous { "(?i)" } else { "" };
    let (kind, body) = match test {
        Test::OneOf(values) => {
            let each: Vec<String> = values.iter().map(|v| regex::escape(v)).collect();
            (Kind::Text, format!("^(?:{})$", each.join("|")))
        }
        Test::Glob(glob) => (Kind::Text, glob_pattern(glob, false)),
        Test::Path(glob) => (Kind::Path, glob_pattern(glob, true)),
        // Deny looks inside, allow must cover the whole.
        Test::Regex(regex) if reading == Reading::Generous => (Kind::Text, format!("(?:{regex})")),
        Test::Regex(regex) => (Kind::Text, format!("^(?:{regex})$")),
        Test::Min(_) | Test::Max(_) | Test::MaxLength(_) | Test::Present(_) => return None,
    };
    Some((kind, format!("{case}{body}")))
}

fn reading_of(effect: Effect) -> Reading {
    if effect == Effect::Allow {
        Reading::Strict
    } else {
        Reading::Generous
    }
}

/// Whether the dotted path of a value is meant by the key of a condition.
fn key_matches(key: &str, path: &str) -> bool {
    key == path || (key.contains('*') && (name_matches(key, path) || key.strip_prefix("*.") == Some(path)))
}

fn number(text: &str) -> Option<f64> {
    // Digit groups are read as lenient tools read them.
    let text = text.trim().replace(['_', ','], "");
    text.parse().ok().or_else(|| i64::from_str_radix(text.strip_prefix("0x")?, 16).ok().map(|n| n as f64))
}

impl CompiledTool {
    fn new(rules: &[(usize, &Rule)], privileged: bool, accepts: &[String], labels: &[String]) -> Result<Self, String> {
        let mut tests: Vec<(Condition, Reading)> = Vec::new();
        let mut filed = Vec::new();
        let mask = |wanted: &[String]| {
            wanted.iter().filter_map(|l| labels.iter().position(|p| p == l)).fold(0u64, |m, bit| m | 1 << bit)
        };
        for &(index, rule) in rules {
            let reading = reading_of(rule.effect);
            let mut needed = Vec::new();
            for condition in &rule.conditions {
                let known = tests.iter().position(|(c, r)| c == condition && *r == reading);
                needed.push(known.unwrap_or_else(|| {
                    tests.push((condition.clone(), reading));
                    tests.len() - 1
                }));
            }
            let (any, none) = (mask(&rule.labels_any), mask(&rule.labels_none));
            filed.push(Filed {
                rule: index,
                agents: Name::all(&rule.agents),
                sessions: Name::all(&rule.sessions),
                any,
                none,
                tests: needed,
            });
        }
        let mut patterns: Vec<Patterns> = Vec::new();
        let mut plain = Vec::new();
        for (index, (condition, reading)) in tests.iter().enumerate() {
            let Some((kind, regex)) = pattern(&condition.test, *reading) else {
                let (key, test) = (condition.key.clone(), condition.test.clone());
                plain.push(Plain { key, reading: *reading, test, index });
                continue;
            };
            let mine = |p: &Patterns| p.key == condition.key && p.reading == *reading && p.kind == kind;
            if let Some(known) = patterns.iter_mut().find(|p| mine(p)) {
                known.regexes.push(regex);
                known.tests.push(index);
            } else {
                let (key, reading) = (condition.key.clone(), *reading);
                patterns.push(Patterns { key, reading, kind, regexes: vec![regex], tests: vec![index] });
            }
        }
        let groups: Result<Vec<Group>, String> = patterns
            .into_iter()
            .map(|Patterns { key, reading, kind, regexes, tests }| {
                let set = RegexSetBuilder::new(regexes)
                    .size_limit(64 << 20)
                    .dfa_size_limit(16 << 20)
                    .build()
                    .map_err(|error| format!("patterns on argument {key:?}: {error}"))?;
                Ok(Group { key, reading, kind, set, tests })
            })
            .collect();
        Ok(Self { privileged, accepts: accepts.to_vec(), rules: filed, groups: groups?, plain, n_tests: tests.len() })
    }

    /// Which tests hold; None where the arguments cannot be looked through.
    fn hold(&self, leaves: &[Leaf]) -> Option<Vec<bool>> {
        let mut hold = vec![false; self.n_tests];
        for group in &self.groups {
            let n = group.tests.len();
            let mut any = vec![false; n];
            let mut all = vec![true; n];
            let mut seen = false;
            for leaf in leaves.iter().filter(|leaf| key_matches(&group.key, &leaf.path)) {
                seen = true;
                let Some(text) = &leaf.text else {
                    // Nothing is known of it: every prohibition applies, no permission does.
                    any.fill(true);
                    all.fill(false);
                    continue;
                };
                for view in views(text, group.reading).ok()? {
                    let mut visit = |text: &str| {
                        let matches = group.set.matches(text);
                        match group.reading {
                            Reading::Generous => matches.iter().for_each(|i| any[i] = true),
                            Reading::Strict if !matches.matched_any() => all.fill(false),
                            Reading::Strict => all.iter_mut().enumerate().for_each(|(i, a)| *a &= matches.matched(i)),
                        }
                    };
                    match group.kind {
                        Kind::Text => visit(&view),
                        Kind::Path => path_views(&view, group.reading, visit),
                    }
                }
            }
            for (i, &test) in group.tests.iter().enumerate() {
                hold[test] = seen && if group.reading == Reading::Generous { any[i] } else { all[i] };
            }
        }
        for plain in &self.plain {
            hold[plain.index] = plain.holds(leaves)?;
        }
        Some(hold)
    }
}

impl Plain {
    fn holds(&self, leaves: &[Leaf]) -> Option<bool> {
        let mut mine = leaves.iter().filter(|leaf| key_matches(&self.key, &leaf.path)).peekable();
        if let Test::Present(wanted) = self.test {
            return Some(mine.peek().is_some() == wanted);
        }
        if mine.peek().is_none() {
            return Some(false);
        }
        let generous = self.reading == Reading::Generous;
        for leaf in mine {
            let Some(text) = &leaf.text else {
                return Some(generous);
            };
            for view in views(text, self.reading).ok()? {
                let holds = match self.test {
                    Test::MaxLength(most) => view.chars().count() <= most,
                    // Not a number, or not comparable: no permission, and no escape from a prohibition.
                    Test::Min(low) => number(&view).is_some_and(|x| x >= low || (generous && x.is_nan())),
                    Test::Max(high) => number(&view).is_some_and(|x| x <= high || (generous && x.is_nan())),
                    _ => false,
                };
                if holds == generous {
                    return Some(generous);
                }
            }
        }
        Some(!generous)
    }
}

impl RuleSet {
    /// Compiles a policy; fails only where patterns exceed the size limit of the matcher.
    pub fn new(policy: Policy) -> Result<Self, String> {
        let labels: Vec<String> = policy.label_patterns().into_iter().map(str::to_owned).collect();
        let mut tools = Vec::with_capacity(policy.tools.len());
        let (mut by_name, mut by_skeleton) = (HashMap::new(), HashMap::new());
        for (index, tool) in policy.tools.iter().enumerate() {
            let rules: Vec<(usize, &Rule)> = policy
                .rules
                .iter()
                .enumerate()
                .filter(|(_, rule)| rule.tools.iter().any(|pattern| tool.is_meant_by(pattern)))
                .collect();
            tools.push(CompiledTool::new(&rules, tool.privileged, &tool.accepts, &labels)?);
            for name in std::iter::once(&tool.name).chain(&tool.aliases) {
                by_name.insert(name.clone(), index);
                by_skeleton.insert(skeleton(name), index);
            }
        }
        Ok(Self { policy, tools, by_name, by_skeleton, labels })
    }

    /// The policy it was made from.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The declared tool that a name means.
    pub fn tool(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).or_else(|| self.by_name.get(&normalise(name))).copied()
    }

    /// Labels among `labels` that are a taint to `tool`.
    pub fn is_tainted(&self, tool: usize, labels: &[&str]) -> bool {
        let fine = |label: &str| {
            self.policy.trusted.iter().chain(&self.tools[tool].accepts).any(|pattern| label_matches(pattern, label))
        };
        labels.iter().any(|label| !fine(label))
    }

    /// Decides a call. `labels` are those of the context it comes from.
    pub fn decide(
        &self,
        tool: &str,
        agent: &str,
        session: &str,
        labels: &[&str],
        arguments: &[(String, Value)],
    ) -> Decision {
        let Some(index) = self.tool(tool) else {
            let looks = self.by_skeleton.contains_key(&skeleton(tool));
            let reason = if looks { Reason::LookAlike } else { Reason::UnknownTool };
            return Decision { effect: Effect::Deny, rule: None, reason };
        };
        let compiled = &self.tools[index];
        let (agent, session) = (normalise(agent), normalise(session));
        let carried = self.labels.iter().enumerate().fold(0u64, |mask, (bit, pattern)| {
            mask | u64::from(labels.iter().any(|label| label_matches(pattern, label))) << bit
        });
        let mut tests: Option<(Vec<Leaf>, Vec<bool>)> = None;
        for filed in &compiled.rules {
            if carried & filed.none != 0
                || (filed.any != 0 && carried & filed.any == 0)
                || !Name::any(&filed.agents, &agent)
                || !Name::any(&filed.sessions, &session)
            {
                continue;
            }
            let rule = &self.policy.rules[filed.rule];
            if !filed.tests.is_empty() || rule.strict_args {
                if tests.is_none() {
                    let looked = leaves(arguments).ok().and_then(|leaves| {
                        let hold = compiled.hold(&leaves)?;
                        Some((leaves, hold))
                    });
                    let Some(looked) = looked else {
                        return Decision { effect: Effect::Deny, rule: Some(filed.rule), reason: Reason::TooComplex };
                    };
                    tests = Some(looked);
                }
                let Some((leaves, hold)) = &tests else {
                    continue;
                };
                if !filed.tests.iter().all(|&test| hold[test]) {
                    continue;
                }
                let known = |leaf: &Leaf| rule.conditions.iter().any(|c| key_matches(&c.key, &leaf.path));
                if rule.strict_args && !leaves.iter().all(known) {
                    continue;
                }
            }
            if rule.effect != Effect::Deny && compiled.privileged && self.is_tainted(index, labels) {
                return Decision { effect: Effect::Deny, rule: Some(filed.rule), reason: Reason::Taint };
            }
            return Decision { effect: rule.effect, rule: Some(filed.rule), reason: Reason::Rule };
        }
        if compiled.privileged {
            return Decision { effect: Effect::Deny, rule: None, reason: Reason::Privileged };
        }
        Decision { effect: self.policy.default, rule: None, reason: Reason::Default }
    }
}
