"""The tone of a sentence by the words in it: thanks, approval, restatement, talk about the work, reports of work done.

The lists are short on purpose: what they say is evidence beside other evidence, weighed by `weights.json`. They cover
English, German, Spanish, French and Chinese.
"""

from __future__ import annotations

import re

THANKS = 1
"""Courtesy and praise."""
APPROVAL = 2
"""Consent and confirmation."""
RESTATEMENT = 4
"""The speaker says that nothing changed, or that something is said once more."""
PROCESS = 8
"""Talk about how to work together rather than work."""
REPORT = 16
"""Something was done or found."""
DOUBT = 32
"""Hedges, and requests for more clarity."""
CAUSE = 64
"""A reason, a decision or a change: what moves a discussion on."""
INTENT = 128
"""Something is promised or about to be done."""
YOU = 256
"""The other is spoken to."""

_WORDS = {
    THANKS: (
        "thank thanks grateful appreciate appreciated appreciates pleasure glad delighted wonderful lovely excellent "
        "fantastic brilliant kind kindness honoured honored happy joy beautifully superb admire insightful thoughtful "
        "danke dank dankbar freut freue gerne herzlich wunderbar großartig schön "
        "gracias gracia agradezco encantado maravilloso excelente placer "
        "merci ravi plaisir magnifique heureux"
    ),
    APPROVAL: (
        "agree agreed agrees absolutely exactly indeed precisely aligned confirm confirmed confirms approve approved "
        "approves endorse concur certainly definitely acknowledged understood right "
        "einverstanden genau richtig stimme stimmt bestätige bestätigt zustimmung völlig "
        "acuerdo exactamente cierto confirmo confirmado aprobado efectivamente claro "
        "accord exactement confirme confirmé parfait oui"
    ),
    RESTATEMENT: (
        "again still remains remain unchanged same already repeat repeated once restate essentially basically namely "
        "reiterate underline stays likewise otherwise "
        "wieder erneut weiterhin unverändert nochmals nochmal bleibt gleich derselbe dieselbe dasselbe bereits "
        "otra vez sigue mismo misma nuevamente igual sigo "
        "encore toujours même inchangé répète reste"
    ),
    PROCESS: (
        "process protocol framework collaboration collaborate alignment align approach structure template format role "
        "roles handover kickoff meeting workflow procedure agenda synergy coordination coordinate methodology strategy "
        "conversation dialogue exchange perspective partnership message "
        "prozess ablauf zusammenarbeit abstimmung struktur vorgehen rolle austausch "
        "proceso colaboración estructura enfoque coordinación plantilla "
        "processus collaboration structure démarche coordination"
    ),
    REPORT: (
        "fixed added removed wrote measured ran found checked tested committed merged installed replaced changed moved "
        "rebuilt uploaded downloaded restored deleted deployed implemented counted compared verified reproduced "
        "patched renamed extracted parsed asked called sent received booked paid signed opened closed read looked "
        "tried updated rewrote built set split dropped raised lowered passes passed fails failed "
        "behoben gemessen gefunden geprüft getestet geändert ersetzt ergänzt entfernt gelesen geschrieben bestellt "
        "corregido añadido medido encontrado probado cambiado revisado eliminado escrito "
        "corrigé ajouté mesuré trouvé testé changé vérifié écrit"
    ),
    DOUBT: (
        "perhaps maybe might possibly clarify clarification unclear wondering wonder unsure seems depends whether "
        "vielleicht eventuell unklar möglicherweise fraglich klären "
        "quizás quizá tal posiblemente aclarar aclaración depende "
        "peut-être éventuellement clarifier précision dépend"
    ),
    CAUSE: (
        "because since therefore so hence instead but however except unless although caused due turned "
        "weil denn deshalb daher aber jedoch statt sondern außer obwohl wegen "
        "porque pero aunque sino debido entonces "
        "car donc mais cependant puisque sauf"
    ),
    INTENT: (
        "will shall soon shortly going plan plans intend let'll i'll we'll ready await waiting wait continue proceed "
        "werde werden gleich bald demnächst warte bereit "
        "voy vamos pronto enseguida espero listo "
        "vais allons bientôt attends prêt"
    ),
    YOU: (
        "you your yours yourself you're you've you'll du dich dir dein deine ihr euch ihre ihnen "
        "tú te ti tu usted ustedes vosotros vous votre vos toi"
    ),
}  # fmt: skip
TONES: dict[str, int] = {}
for _tone, _listed in _WORDS.items():
    for _word in _listed.split():
        TONES[_word] = TONES.get(_word, 0) | _tone

_PHRASES: dict[int, tuple[str, ...]] = {
    THANKS: (
        r"well (?:said|done|put)", r"great (?:job|work|point|to hear)", "good point", "vielen dank", "muchas gracias",
        "谢谢", "感谢", "荣幸", "高兴",
    ),
    APPROVAL: (
        r"(?:couldn't|could not) agree", "of course", "no objection", "sounds good", "makes sense", "on board",
        "同意", "赞同", "没错", "确认", "正是", "好的",
    ),
    RESTATEMENT: (
        "in other words", "put differently", "to put it", r"as (?:said|stated|noted|mentioned|before|described)",
        "once more", r"nothing (?:new|further|has changed|changed)", r"no (?:change|news)", "to sum", "in short",
        "that is to say", "anders gesagt", "mit anderen worten", "wie gesagt", "kurz gesagt", "en otras palabras",
        "es decir", "dicho de otro modo", "autrement dit", "en d'autres termes",
        "换句话说", "也就是说", "仍然", "依然", "再次", "重申", "还是",
    ),
    PROCESS: (
        r"next steps?\b", "going forward", "moving forward", "work together", "how we", r"our (?:work|way|exchange)",
        "流程", "协作", "框架", "对齐", "沟通",
    ),
    DOUBT: (
        r"(?:could|can) you (?:clarify|confirm|tell|say)", "what do you", "not sure",
        "请问", "是否", "也许", "可能",
    ),
    REPORT: (
        r"\bexit (?:code )?\d", r"\bcommit [0-9a-f]{6}",
        "已经?", "完成", "修复", "测试", "发现", "改为",
    ),
    INTENT: ("right away", "in a moment", "as soon as", "looking forward", "将", "马上", "期待", "等待"),
    YOU: ("你", "您"),
    CAUSE: (r"turns? out", "the reason", "as a result", "rather than", "因为", "所以", "但是", "因此"),
}  # fmt: skip
_PHRASE = re.compile("|".join(f"(?P<t{tone}>{'|'.join(phrases)})" for tone, phrases in _PHRASES.items()))


def tone_of(text: str, words: list[str]) -> int:
    """The tones of a sentence, one bit each; `text` and its `words` in lower case."""
    found = 0
    for word in words:
        found |= TONES.get(word, 0)
    for match in _PHRASE.finditer(text):
        found |= int(match.lastgroup[1:]) if match.lastgroup is not None else 0
    return found
