//! Brackets, quotes and comments of a text that is being written, in any language that has them: enough to know whether
//! a place lies inside of something that the text itself has opened.

/// Where the next character lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    Code,
    /// To the end of the line.
    Comment,
    /// To the closing quote, or the end of the line.
    Quote {
        quote: char,
        is_escaped: bool,
    },
    /// To three of these.
    Triple {
        quote: char,
        is_escaped: bool,
        seen: u8,
    },
}

/// What a character has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Nothing that matters.
    Nothing,
    /// It closes a bracket that was open before the text began.
    ClosesOuter,
    /// It ends a line, with nothing open.
    LineEnd,
}

/// Reads a text character by character.
#[derive(Debug, Clone)]
pub struct Scanner {
    inside: Inside,
    /// Brackets that the text has opened and not closed.
    open: Vec<char>,
    previous: char,
    /// The last quotes in a row, of one kind.
    quotes: u8,
    /// Letters, digits and underscores in a row before the next character.
    word: usize,
    /// Whether the line has a lifetime of Rust's: further ticks before names are others.
    has_lifetime: bool,
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner {
            inside: Inside::Code,
            open: Vec::new(),
            previous: '\n',
            quotes: 0,
            word: 0,
            has_lifetime: false,
        }
    }
}

impl Scanner {
    /// Takes the next character; `next` is the one after it, where it is known.
    pub fn push(&mut self, character: char, next: Option<char>) -> Event {
        let event = self.step(character, next);
        self.previous = character;
        self.word = if is_word(character) { self.word + 1 } else { 0 };
        event
    }

    /// Whether something that the text has opened is open: a bracket, or a string over several lines.
    pub fn is_inside(&self) -> bool {
        !self.open.is_empty() || matches!(self.inside, Inside::Triple { .. })
    }

    fn step(&mut self, character: char, next: Option<char>) -> Event {
        let is_quote = matches!(character, '"' | '\'' | '`');
        self.quotes =
            if is_quote && character == self.previous { self.quotes + 1 } else { u8::from(is_quote) };
        match self.inside {
            Inside::Triple { quote, is_escaped, seen } => {
                let seen = if character == quote && !is_escaped { seen + 1 } else { 0 };
                self.inside = match seen {
                    3 => Inside::Code,
                    _ => Inside::Triple { quote, is_escaped: character == '\\' && !is_escaped, seen },
                };
                Event::Nothing
            }
            _ if character == '\n' => {
                // A quote that is not closed by now was an apostrophe.
                (self.inside, self.has_lifetime) = (Inside::Code, false);
                if self.open.is_empty() { Event::LineEnd } else { Event::Nothing }
            }
            Inside::Comment => Event::Nothing,
            Inside::Quote { quote, is_escaped } => {
                self.inside = match () {
                    () if character == quote && !is_escaped => Inside::Code,
                    () => Inside::Quote { quote, is_escaped: character == '\\' && !is_escaped },
                };
                Event::Nothing
            }
            Inside::Code => self.code(character, next),
        }
    }

    fn code(&mut self, character: char, next: Option<char>) -> Event {
        match character {
            '(' | '[' | '{' => self.open.push(character),
            ')' | ']' | '}' => {
                let opening = match character {
                    ')' => '(',
                    ']' => '[',
                    _ => '{',
                };
                match self.open.iter().rposition(|open| *open == opening) {
                    // What was opened in between was none.
                    Some(at) => self.open.truncate(at),
                    None => return Event::ClosesOuter,
                }
            }
            '/' if self.previous == '/' => self.inside = Inside::Comment,
            // A heading, an attribute and a colour have something else behind it.
            '#' if next.is_none_or(|c| c.is_whitespace() || c == '!') && !is_word(self.previous) => {
                self.inside = Inside::Comment;
            }
            '"' | '\'' if self.quotes == 3 => {
                self.inside = Inside::Triple { quote: character, is_escaped: false, seen: 0 };
            }
            '\'' if matches!(self.previous, '&' | '<') || self.has_lifetime => {
                self.has_lifetime = true;
            }
            // As in "don't"; shorter words are the prefixes of strings.
            '\'' if self.word > 2 && next.is_some_and(is_word) => {}
            '"' | '\'' | '`' => self.inside = Inside::Quote { quote: character, is_escaped: false },
            _ => {}
        }
        Event::Nothing
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}
