//! One form for expressions that mean the same.

use super::Expr;

/// The canonical form: nested conjunctions and disjunctions flattened, single children unwrapped, duplicates removed,
/// children sorted, double negation gone. `decode(encode(e))` equals `canonical(e)`.
pub fn canonical(expr: &Expr) -> Expr {
    match expr {
        Expr::Atom(_) => expr.clone(),
        Expr::Not(inner) => match canonical(inner) {
            Expr::Not(twice) => *twice,
            other => Expr::Not(Box::new(other)),
        },
        Expr::And(children) => {
            let mut out = Vec::new();
            for child in children {
                match canonical(child) {
                    Expr::And(inner) => out.extend(inner),
                    other => out.push(other),
                }
            }
            finish(out, Expr::And)
        }
        Expr::Or(children) => {
            let mut out = Vec::new();
            for child in children {
                match canonical(child) {
                    Expr::Or(inner) => out.extend(inner),
                    other => out.push(other),
                }
            }
            finish(out, Expr::Or)
        }
    }
}

fn finish(mut children: Vec<Expr>, wrap: fn(Vec<Expr>) -> Expr) -> Expr {
    children.sort();
    children.dedup();
    if children.len() == 1 {
        children.remove(0)
    } else {
        wrap(children)
    }
}
