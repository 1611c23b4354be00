//! Which language a conversation is in: scripts, alphabets and trigram profiles (`whatlang`), a pure
//! function of the text.

use crate::conversation::Conversation;
use crate::markdown::prose;
use std::fmt;
use whatlang::{Lang, Script};

/// Letters below which nothing is said.
const LEAST_LETTERS: usize = 60;
/// Letters that are looked at; more tell no more.
const MOST_LETTERS: usize = 2000;

/// A language that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Language(Lang);

/// ISO 639-1 codes where there are any.
const TWO_LETTERS: [(&str, Lang); 70] = [
    ("eo", Lang::Epo),
    ("en", Lang::Eng),
    ("ru", Lang::Rus),
    ("zh", Lang::Cmn),
    ("es", Lang::Spa),
    ("pt", Lang::Por),
    ("it", Lang::Ita),
    ("bn", Lang::Ben),
    ("fr", Lang::Fra),
    ("de", Lang::Deu),
    ("uk", Lang::Ukr),
    ("ka", Lang::Kat),
    ("ar", Lang::Ara),
    ("hi", Lang::Hin),
    ("ja", Lang::Jpn),
    ("he", Lang::Heb),
    ("yi", Lang::Yid),
    ("pl", Lang::Pol),
    ("am", Lang::Amh),
    ("jv", Lang::Jav),
    ("ko", Lang::Kor),
    ("nb", Lang::Nob),
    ("da", Lang::Dan),
    ("sv", Lang::Swe),
    ("fi", Lang::Fin),
    ("tr", Lang::Tur),
    ("nl", Lang::Nld),
    ("hu", Lang::Hun),
    ("cs", Lang::Ces),
    ("el", Lang::Ell),
    ("bg", Lang::Bul),
    ("be", Lang::Bel),
    ("mr", Lang::Mar),
    ("kn", Lang::Kan),
    ("ro", Lang::Ron),
    ("sl", Lang::Slv),
    ("hr", Lang::Hrv),
    ("sr", Lang::Srp),
    ("mk", Lang::Mkd),
    ("lt", Lang::Lit),
    ("lv", Lang::Lav),
    ("et", Lang::Est),
    ("ta", Lang::Tam),
    ("vi", Lang::Vie),
    ("ur", Lang::Urd),
    ("th", Lang::Tha),
    ("gu", Lang::Guj),
    ("uz", Lang::Uzb),
    ("pa", Lang::Pan),
    ("az", Lang::Aze),
    ("id", Lang::Ind),
    ("te", Lang::Tel),
    ("fa", Lang::Pes),
    ("ml", Lang::Mal),
    ("or", Lang::Ori),
    ("my", Lang::Mya),
    ("ne", Lang::Nep),
    ("si", Lang::Sin),
    ("km", Lang::Khm),
    ("tk", Lang::Tuk),
    ("ak", Lang::Aka),
    ("zu", Lang::Zul),
    ("sn", Lang::Sna),
    ("af", Lang::Afr),
    ("la", Lang::Lat),
    ("sk", Lang::Slk),
    ("ca", Lang::Cat),
    ("tl", Lang::Tgl),
    ("hy", Lang::Hye),
    ("cy", Lang::Cym),
];

impl Language {
    /// From an ISO 639-1 code, such as `en`, or an ISO 639-3 one, such as `eng`.
    pub fn parse(code: &str) -> Option<Self> {
        let two = TWO_LETTERS.iter().find(|(two, _)| *two == code).map(|(_, lang)| *lang);
        two.or_else(|| Lang::from_code(code)).map(Self)
    }

    /// ISO 639-1, or 639-3 where there is none.
    pub fn code(self) -> &'static str {
        TWO_LETTERS.iter().find(|(_, lang)| *lang == self.0).map_or(self.0.code(), |(two, _)| two)
    }

    /// Every code that [`Language::code`] gives.
    pub fn codes() -> Vec<&'static str> {
        let mut codes: Vec<_> = Lang::all().iter().map(|lang| Self(*lang).code()).collect();
        codes.sort_unstable();
        codes
    }
}

impl fmt::Display for Language {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.code())
    }
}

/// What can be told of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Language(Language),
    /// How it is written is clear; which of the languages that are written so, is not.
    Script(Script),
    /// It is too short.
    Nothing,
}

impl Found {
    /// Whether the text can be in `wanted`, as far as can be told.
    pub fn may_be(self, wanted: Language) -> bool {
        match self {
            Self::Language(found) => found == wanted,
            Self::Script(script) => script.langs().contains(&wanted.0) || also_written(wanted.0, script),
            Self::Nothing => true,
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Language(language) => language.fmt(out),
            Self::Script(script) => write!(out, "unclear ({script})"),
            Self::Nothing => out.write_str("too short to tell"),
        }
    }
}

/// Scripts of a language besides the one that its profile is of.
fn also_written(language: Lang, script: Script) -> bool {
    match language {
        Lang::Jpn | Lang::Cmn => matches!(script, Script::Mandarin | Script::Hiragana | Script::Katakana),
        Lang::Srp => script == Script::Latin,
        Lang::Aze | Lang::Uzb | Lang::Tuk => script == Script::Cyrillic,
        Lang::Pan => script == Script::Arabic,
        _ => false,
    }
}

/// The language of what is said outside of code.
pub fn of(conversation: &Conversation) -> Found {
    let mut text = String::new();
    let mut letters = 0;
    for line in conversation.exchange().iter().flat_map(|turn| prose(&turn.content)) {
        for word in line.split_whitespace().filter(|word| !word.contains("://")) {
            letters += word.chars().filter(|letter| letter.is_alphabetic()).count();
            text.push_str(word);
            text.push(' ');
        }
        if letters >= MOST_LETTERS {
            break;
        }
    }
    match whatlang::detect(&text) {
        Some(found) if letters < least(found.script()) => Found::Nothing,
        Some(found) if found.is_reliable() => Found::Language(Language(found.lang())),
        Some(found) => Found::Script(found.script()),
        None => Found::Nothing,
    }
}

/// A letter of Chinese says as much as several of an alphabet.
fn least(script: Script) -> usize {
    match script {
        Script::Mandarin | Script::Hiragana | Script::Katakana | Script::Hangul => LEAST_LETTERS / 4,
        _ => LEAST_LETTERS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Turn;

    fn of_text(text: &str) -> Found {
        let turns = vec![Turn::user(""), Turn::assistant(text)];
        of(&Conversation { id: "x".into(), turns })
    }

    fn language(code: &str) -> Language {
        Language::parse(code).unwrap()
    }

    #[test]
    fn sentences_in_many_languages_are_told_apart() {
        for (code, text) in [
            (
                "en",
                "The quick answer is that you should restart the server and then look at what it wrote into its log.",
            ),
            (
                "de",
                "Die kurze Antwort ist, dass du den Server neu starten und dann in seine Protokolle schauen solltest.",
            ),
            ("fr", "La réponse courte est que vous devriez redémarrer le serveur puis regarder ce qu'il a écrit."),
            (
                "es",
                "La respuesta corta es que deberías reiniciar el servidor y luego mirar lo que escribió en su registro.",
            ),
            ("zh", "简短的回答是，你应该重新启动服务器，然后查看它写入日志的内容。"),
            ("ja", "簡単に言うと、サーバーを再起動してから、ログに書かれた内容を確認してください。"),
            ("ko", "간단히 말하면 서버를 다시 시작한 다음 로그에 기록된 내용을 확인해야 합니다."),
        ] {
            assert_eq!(of_text(text), Found::Language(language(code)), "{text}");
        }
    }

    #[test]
    fn code_and_addresses_are_not_a_language() {
        let code =
            "```\nfor item in list: print(item) if item else continue while true return nothing here at all\n```";
        assert_eq!(of_text(code), Found::Nothing);
        assert_eq!(of_text(&format!("Siehe https://{}", "a".repeat(100))), Found::Nothing);
        assert_eq!(of_text("Ok."), Found::Nothing);
        assert!(of_text("Ok.").may_be(language("ja")));
    }

    #[test]
    fn a_script_rules_languages_out_that_are_not_written_in_it() {
        let russian = "Краткий ответ: перезапустите сервер, а затем посмотрите, что он записал в свой журнал событий.";
        let found = of_text(russian);
        assert!(found.may_be(language("ru")), "{found}");
        assert!(!found.may_be(language("en")) && !found.may_be(language("ja")), "{found}");
        let kanji = Found::Script(Script::Mandarin);
        assert!(kanji.may_be(language("ja")) && kanji.may_be(language("zh")) && !kanji.may_be(language("ko")));
    }

    #[test]
    fn every_code_is_read_back() {
        for code in Language::codes() {
            assert_eq!(Language::parse(code).map(Language::code), Some(code));
        }
        assert_eq!(Language::parse("eng"), Language::parse("en"));
        assert_eq!(Language::parse("english"), None);
        assert_eq!(Language::codes().len(), Lang::all().len());
    }
}
