//! URI templates of `paths` (S2.57, S2.58).

/// A parsed template: literal text, `{*}` (one non-empty segment) and `{**}` (any text).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    tokens: Vec<Token>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Literal(Box<str>),
    One,
    Any,
}

/// What `{*}` and `{**}` stand for: the characters of a path segment in RFC 3986, as Envoy has it. Other ones
/// occur in paths that are not normalised.
pub(super) fn is_segment_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;:@=".contains(&byte)
}

/// Bounds the work of [`Template::matches`]; Envoy allows no more operators either.
const MAX_OPERATORS: usize = 5;

impl Template {
    /// Parses Istio's spelling.
    pub(super) fn parse(text: &str) -> Result<Template, String> {
        if !text.starts_with('/') {
            return Err("must start with /".into());
        }
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix("{**}") {
                tokens.push(Token::Any);
                rest = after;
            } else if let Some(after) = rest.strip_prefix("{*}") {
                tokens.push(Token::One);
                rest = after;
            } else {
                let end = rest.find('{').unwrap_or(rest.len());
                let literal = &rest[..end];
                if literal.is_empty() {
                    return Err("braces may only hold * or **".into());
                }
                if literal.contains(['}', '*']) {
                    return Err("} and * are only allowed as {*} and {**}".into());
                }
                tokens.push(Token::Literal(literal.into()));
                rest = &rest[end..];
            }
        }
        let operators = tokens.iter().filter(|t| !matches!(t, Token::Literal(_))).count();
        if operators > MAX_OPERATORS {
            return Err(format!("more than {MAX_OPERATORS} of {{*}} and {{**}}"));
        }
        let any = tokens.iter().position(|t| *t == Token::Any);
        let last_operator = tokens.iter().rposition(|t| !matches!(t, Token::Literal(_)));
        if any.is_some() && any != last_operator {
            return Err("{**} must be the last of the operators".into());
        }
        let adjacent = tokens
            .windows(2)
            .any(|w| !w.iter().any(|t| matches!(t, Token::Literal(_))));
        if adjacent {
            return Err("two operators need text between them".into());
        }
        Ok(Template { tokens })
    }

    /// Whether a path (without query) matches.
    pub(super) fn matches(&self, path: &str) -> bool {
        run(&self.tokens, path.as_bytes())
    }

    /// Text that every matching path starts with; not empty.
    pub(super) fn prefix(&self) -> &str {
        match self.tokens.first() {
            Some(Token::Literal(text)) => text,
            _ => "/",
        }
    }
}

fn run(tokens: &[Token], path: &[u8]) -> bool {
    let Some((first, rest)) = tokens.split_first() else {
        return path.is_empty();
    };
    match first {
        Token::Literal(text) => path.strip_prefix(text.as_bytes()).is_some_and(|after| run(rest, after)),
        Token::One => {
            let length = path.iter().take_while(|b| is_segment_byte(**b)).count();
            (1..=length).rev().any(|n| run(rest, &path[n..]))
        }
        // `{**}` is the last operator: what follows is one literal at most.
        Token::Any => {
            let tail: &[u8] = match rest {
                [Token::Literal(text)] => text.as_bytes(),
                _ => b"",
            };
            path.strip_suffix(tail)
                .is_some_and(|text| text.iter().all(|b| *b == b'/' || is_segment_byte(*b)))
        }
    }
}
