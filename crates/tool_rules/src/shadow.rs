//! Rules that can never decide.
//!
//! Rule j is *shadowed* if, for each tool it means, an earlier rule covers it: matches every call that j matches.
//! Coverage is decided piece by piece (names, labels, argument tests) and only ever claimed when certain, so a
//! reported rule is dead, while a dead rule may go unreported (coverage by several rules together is found per tool,
//! not per argument).

use crate::policy::{label_matches, name_matches, Condition, Effect, Finding, Policy, Rule, Severity, Tool};

/// Whether every name that `narrow` matches is matched by `wide`.
fn names_cover(wide: &[String], narrow: &[String]) -> bool {
    if wide.is_empty() {
        return true;
    }
    // A pattern is covered if the wider one matches it read as a name: its stars stand for themselves there, and a
    // star of the wide pattern covers them.
    !narrow.is_empty() && narrow.iter().all(|n| wide.iter().any(|w| w == n || name_matches(w, n)))
}

fn labels_cover(earlier: &Rule, later: &Rule) -> bool {
    let any = earlier.labels_any.is_empty()
        || (!later.labels_any.is_empty()
            && later.labels_any.iter().all(|l| earlier.labels_any.iter().any(|e| label_matches(e, l))));
    let none = earlier.labels_none.iter().all(|e| later.labels_none.iter().any(|l| label_matches(l, e)));
    any && none
}

fn arguments_cover(earlier: &Rule, later: &Rule) -> bool {
    // A permission reads strictly, a prohibition generously: what one of the first kind matches, the second kind
    // does too, but not the other way round.
    let comparable = earlier.effect != Effect::Allow || later.effect == Effect::Allow;
    let held = |wanted: &Condition| later.conditions.iter().any(|c| c == wanted);
    (earlier.conditions.is_empty() || (comparable && earlier.conditions.iter().all(held)))
        && (!earlier.strict_args || (later.strict_args && earlier.conditions == later.conditions))
}

fn covers(earlier: &Rule, later: &Rule) -> bool {
    names_cover(&earlier.agents, &later.agents)
        && names_cover(&earlier.sessions, &later.sessions)
        && labels_cover(earlier, later)
        && arguments_cover(earlier, later)
}

/// Warnings about a policy: shadowed rules, and permissions that taint or the tool list make void.
pub fn warnings(policy: &Policy) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut warn = |rule: &Rule, code: &'static str, message: String| {
        findings.push(Finding { line: rule.line, column: rule.column, severity: Severity::Warning, code, message });
    };
    for (j, later) in policy.rules.iter().enumerate() {
        let tools: Vec<&Tool> =
            policy.tools.iter().filter(|tool| later.tools.iter().any(|pattern| tool.is_meant_by(pattern))).collect();
        let mut by: Vec<&Rule> = Vec::new();
        let dead = !tools.is_empty()
            && tools.iter().all(|tool| {
                let found = policy.rules[..j].iter().find(|earlier| {
                    earlier.tools.iter().any(|pattern| tool.is_meant_by(pattern)) && covers(earlier, later)
                });
                by.extend(found);
                found.is_some()
            });
        if dead {
            by.sort_by_key(|rule| rule.line);
            by.dedup_by_key(|rule| rule.line);
            let names: Vec<String> = by.iter().map(|r| format!("{} (line {})", r.id, r.line)).collect();
            let what = if by.iter().all(|r| r.effect == later.effect) { "redundant" } else { "never reached" };
            warn(
                later,
                "shadowed",
                format!("rule {:?} is {what}, an earlier rule decides first: {}", later.id, names.join(", ")),
            );
        }
        let refused = |label: &String, tool: &Tool| {
            tool.privileged && !policy.trusted.iter().chain(&tool.accepts).any(|pattern| label_matches(pattern, label))
        };
        if later.effect != Effect::Deny
            && !later.labels_any.is_empty()
            && !tools.is_empty()
            && tools.iter().all(|tool| later.labels_any.iter().all(|label| refused(label, tool)))
        {
            let tool = &tools[0].name;
            warn(
                later,
                "unreachable",
                format!("rule {:?} asks for a taint that its tools refuse; add it to tools.{tool}.accepts", later.id),
            );
        }
    }
    findings
}
