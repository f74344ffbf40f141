//! The compiled rules against a naive reading of the same rules, and: a rule reported as dead never decides.

use proptest::prelude::*;
use tool_rules::policy::{label_matches, name_matches, Condition, Rule, Test, Tool};
use tool_rules::{shadow, Effect, Policy, Reason, RuleSet, Value};

fn names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "a*", "*b", "*"]), 0..3)
        .prop_map(|v| v.into_iter().map(str::to_owned).collect())
}

fn labels() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(prop::sample::select(vec!["web", "web:x", "mail"]), 0..2)
        .prop_map(|v| v.into_iter().map(str::to_owned).collect())
}

fn condition() -> impl Strategy<Value = Condition> {
    let test = prop_oneof![
        prop::sample::select(vec!["x", "y", "xy"]).prop_map(|v| Test::OneOf(vec![v.to_owned()])),
        prop::sample::select(vec!["x*", "*y"]).prop_map(|v| Test::Glob(v.to_owned())),
        prop::bool::ANY.prop_map(Test::Present),
    ];
    (prop::sample::select(vec!["p", "q"]), test).prop_map(|(key, test)| Condition { key: key.to_owned(), test })
}

fn rule() -> impl Strategy<Value = Rule> {
    let effect = prop::sample::select(vec![Effect::Allow, Effect::Deny, Effect::Ask]);
    let conditions = prop::collection::vec(condition(), 0..3);
    (effect, names(), names(), labels(), labels(), conditions, prop::bool::ANY).prop_map(
        |(effect, mut tools, agents, labels_any, labels_none, conditions, strict)| {
            if tools.is_empty() {
                tools.push("a".to_owned());
            }
            Rule {
                id: String::new(),
                effect,
                tools,
                agents,
                sessions: Vec::new(),
                labels_any,
                labels_none,
                conditions,
                strict_args: strict && effect == Effect::Allow,
                reason: String::new(),
                line: 0,
                column: 0,
            }
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::collection::vec(rule(), 0..7).prop_map(|mut rules| {
        for (n, rule) in rules.iter_mut().enumerate() {
            rule.id = n.to_string();
            rule.line = n;
        }
        let tool = |name: &str, privileged| Tool {
            name: name.to_owned(),
            aliases: Vec::new(),
            privileged,
            accepts: vec!["mail".to_owned()],
            adds: Vec::new(),
            line: 0,
        };
        Policy {
            default: Effect::Ask,
            trusted: Vec::new(),
            tools: vec![tool("a", false), tool("b", true), tool("ab", false)],
            rules,
            sanitisers: Vec::new(),
        }
    })
}

type Call = (&'static str, &'static str, Vec<&'static str>, Vec<(String, Value)>);

fn call() -> impl Strategy<Value = Call> {
    let name = || prop::sample::select(vec!["a", "b", "ab"]);
    let labels = prop::sample::subsequence(vec!["web", "web:x", "mail", "mail:y"], 0..3);
    let value = prop::sample::select(vec!["x", "y", "xy", "z"]).prop_map(|v| Value::Str(v.to_owned()));
    let argument = (prop::sample::select(vec!["p", "q"]).prop_map(str::to_owned), value);
    (name(), name(), labels, prop::collection::vec(argument, 0..3))
}

fn matches(rule: &Rule, (tool, agent, labels, arguments): &Call) -> bool {
    let holds = |c: &Condition| {
        let mut values = arguments.iter().filter(|(k, _)| *k == c.key).map(|(_, v)| match v {
            Value::Str(s) => s.as_str(),
            _ => unreachable!("the strategy makes strings"),
        });
        let one = |v: &str| match &c.test {
            Test::OneOf(list) => list.iter().any(|x| x == v),
            Test::Glob(glob) => name_matches(glob, v),
            _ => false,
        };
        let n = arguments.iter().filter(|(k, _)| *k == c.key).count();
        match c.test {
            Test::Present(wanted) => (n > 0) == wanted,
            _ if rule.effect == Effect::Allow => n > 0 && values.all(one),
            _ => values.any(one),
        }
    };
    let carries = |pattern: &String| labels.iter().any(|label| label_matches(pattern, label));
    rule.tools.iter().any(|p| name_matches(p, tool))
        && (rule.agents.is_empty() || rule.agents.iter().any(|p| name_matches(p, agent)))
        && (rule.labels_any.is_empty() || rule.labels_any.iter().any(carries))
        && !rule.labels_none.iter().any(carries)
        && rule.conditions.iter().all(holds)
        && (!rule.strict_args || arguments.iter().all(|(k, _)| rule.conditions.iter().any(|c| c.key == *k)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn the_first_matching_rule_decides(policy in policy(), call in call()) {
        let expected = policy.rules.iter().position(|rule| matches(rule, &call));
        let rules = RuleSet::new(policy.clone()).unwrap();
        let (tool, agent, labels, arguments) = &call;
        let decided = rules.decide(tool, agent, "s", labels, arguments);
        prop_assert_eq!(decided.rule, expected);
        let tainted = *tool == "b" && labels.iter().any(|l| !label_matches("mail", l));
        match expected.map(|n| policy.rules[n].effect) {
            Some(effect) if effect == Effect::Deny || !tainted => prop_assert_eq!(decided.effect, effect),
            Some(_) => prop_assert_eq!(decided.reason, Reason::Taint),
            None if *tool == "b" => prop_assert_eq!(decided.reason, Reason::Privileged),
            None => prop_assert_eq!(decided.effect, Effect::Ask),
        }
    }

    #[test]
    fn a_rule_reported_as_dead_never_decides(policy in policy(), calls in prop::collection::vec(call(), 40)) {
        let dead: Vec<usize> =
            shadow::warnings(&policy).into_iter().filter(|f| f.code == "shadowed").map(|f| f.line).collect();
        let rules = RuleSet::new(policy).unwrap();
        for (tool, agent, labels, arguments) in &calls {
            let decided = rules.decide(tool, agent, "s", labels, arguments);
            prop_assert!(!decided.rule.is_some_and(|rule| dead.contains(&rule)));
        }
    }

    #[test]
    fn nothing_a_caller_sends_makes_it_panic(name in ".*", text in ".*", agent in ".*") {
        let (policy, _) = Policy::parse(
            "version = 1\n[tools.t]\n[[rules]]\nid = 'x'\neffect = 'deny'\ntools = ['t']\nargs.'*'.path = '/a/**'\n\
             [[rules]]\nid = 'y'\neffect = 'allow'\ntools = ['t']\nargs.'*'.min = 3\n",
        );
        let rules = RuleSet::new(policy.unwrap()).unwrap();
        rules.decide(&name, &agent, "s", &[&text], &[]);
        rules.decide("t", &agent, "s", &[], &[(name, Value::Str(text))]);
    }

    #[test]
    fn no_policy_text_makes_it_panic(text in "[\\PC\n]{0,200}", tail in "(version = 1|\\[\\[rules\\]\\]|id = 3|args = .*|\n){0,8}") {
        Policy::parse(&text);
        Policy::parse(&format!("version = 1\n{tail}"));
    }
}
