"""Cues of the finding labeller: words that deny, doubt or assert a mention in their scope.

Regular expressions over lower-case sentences. `CUES` precede their scope, the tables `..._AFTER`
start at the end of a mention, the other tables limit the scope of a cue. The method (cues of
negation and doubt in the same clause) follows the CheXpert labeller of Irvin et al. 2019
(arXiv 1901.07031, appendix B). The expressions are our own and share nothing with the generator.
"""

from __future__ import annotations

_IMAGE = (
    r"(?:stud(?:y|ies)|exam(?:s|ination|inations)?|films?|radiographs?|x-?rays?|images?|imaging|"
    r"chest|cts?|scans?|comparisons?|reports?|priors?|views?|___|xxxx)\b"
)
_DEGREE = (
    r"relevant|major|marked|significant|substantial|notable|noteworthy|appreciable|considerable|"
    r"radiographic|radiological|interval|definite|gross|obvious|clear|other|further|great|real|"
    r"large|overall|discernible|detectable|visible|important|evident|dramatic|drastic|material|"
    r"meaningful|measurable|clinically|short[- ]term|apparent|convincing|new|additional"
)
_CHANGE = (
    r"(?:changes?|worsening|improvement|increase|decrease|enlargement|progression|deterioration|"
    r"resolution|clearing|clearance|expansion|growth|reduction|regression|difference|alteration)"
)
_ENDED = r"(?:resolution|clearing|clearance|disappearance|resorption)"
_PARTLY = (
    r"(?:partial(?:ly)?|incomplete(?:ly)?|near(?:ly)?|near[- ]complete(?:ly)?|near[- ]total(?:ly)?|"
    r"almost|mostly|largely|some|slight(?:ly)?|mild(?:ly)?|minimal(?:ly)?|modest|gradual(?:ly)?|"
    r"subtotal|ongoing|continued|further|significant(?:ly)?|substantial(?:ly)?|not|yet to)"
)
_SHOWN = (
    r"(?:seen|identified|noted|present|visuali[sz]ed|detected|evident|appreciated|demonstrated|"
    r"observed|found|apparent|visible|recogni[sz]ed|depicted|shown|there|delineated)"
)
_CHANGED = (
    r"(?:changed|increased|decreased|improved|worsened|progressed|enlarged|grown|resolved|cleared|"
    r"different|altered|larger|smaller|bigger|worse|better|as|quite|so|only|necessarily)"
)
_NO = r"(?:no|without|with no|w/o|(?:has|have) not (?:been|shown|had) (?:any|an|a)?)"

_PLACES = (
    r"(?: (?:in|at|of|on|over|the|both|right|left|bilateral\w*|upper|lower|mid|middle|lobes?|"
    r"lungs?|bas(?:e|es|is|ilar)|lingula|zones?|region|side|hemithorax|apex|apices|changes?|disease|"
    r"pattern|process|formation))*"
)
"""Location of a finding, without another finding."""
_CAUSE = (
    r"(?:atelecta|pneumonia|o?edema|consolidat|aspirat|infect|scar|fibros|malignan|h[ae]+morrh)"
)

NEUTRAL = (
    r"\b(?:"
    r"(?:as )?(?:compared|in comparison|comparison|similar|relative)(?: is)?(?: made)? (?:to|with)"
    r"(?: \w+){0,3}? " + _IMAGE + r"|"
    r"(?:no|without)(?: \w+){0,2}? (?:prior|previous|old|older|earlier|recent|relevant|comparison|"
    r"comparative|outside)(?: \w+){0,2}? (?:available|" + _IMAGE + r")(?: for comparison)?|"
    r"no (?:prior|previous|comparison|comparisons|priors)\b(?! \w+ (?:effusion|pneumo|fracture))|"
    r"(?:prior|previous|old|recent)(?: \w+)? " + _IMAGE + r"|"
    r"previously (?:seen|noted|described|identified|demonstrated|reported|visuali[sz]ed|present|"
    r"mentioned|observed|known)|"
    r"not only|not just|not without|not necessarily|no doubt|without (?:a )?doubt|"
    r"non[- ]?(?:specific|calcified|displaced|obstruct\w+|enlarged|dependent|occlusive)|"
    r"(?:(?:has|have|is|are|was|were) )?(?:still |yet )?not (?:yet )?(?:\w+ly |yet )?(?:been )?"
    + _CHANGED
    + r"|(?:has|have|had) neither|"
    r"(?:"
    + _PARTLY
    + r" )(?:\w+ ){0,2}?(?:resolved|cleared|removed)|"
    + r"fail(?:s|ed|ure)? to (?:\w+ )?(?:resolve|clear|improve|change)|"
    r"(?:has|have|had|is|are|was|were|been) (?:now |since |\w+ly )*(?:resolved|cleared|excluded)|"
    r"unlikely(?=\s*[.,;])|(?:is|are) (?:\w+ )?(?:unlikely|absent)(?! to|,? as (?:is|are)\b)"
    r")"
)
"""Phrases that resemble a cue but are not one, or that refer to the preceding text."""

PLACE = (
    r"\b(?:(?:adjacent|next|contiguous|lateral|medial|superior|inferior|distal|proximal|close) to|"
    r"(?:beneath|underneath|surrounding|around|near|within|behind|along|in spite of|"
    r"notwithstanding) (?=(?:the|an?|this|these|that|known|right|left|moderate|severe|"
    r"extensive)\b)|"
    r"in (?=(?:the|this|these) (?:(?:right|left|upper|lower|middle|lobe|lung|basilar|known|"
    r"existing|persistent|dense|large|small) )*"
    r"(?:consolidat|opaci|atelecta|effusion|mass|nodul|edema)))"
)
"""The following finding is presupposed: "no effusion adjacent to the consolidation"."""

PLACE_END = (
    r"\b(?:to|concerning|worrisome|suspicious|suggest\w*|compatible|consistent|"
    r"(?:(?:lung|lobe|base|field|space)s?|chest|thorax|hemithorax) (?:of|for))\b"
)
"""Also ends the scope of a place."""

CHANGE = (
    r"\b(?:"
    + _NO
    + r" (?:(?:evidence|suggestion|signs?|indication) (?:of|for) (?:an? )?|(?:"
    + _DEGREE
    + r")[ ,]+(?:(?:and|or) (?=(?:"
    + _DEGREE
    + r")\b))?|___ )*"
    + _CHANGE
    + r"\b(?: (?:in|of|to|from|for)\b)?|"
    r"no (?:(?!or |and |nor |in |of )[\w-]+ ){0,3}" + _CHANGE + r" (?:in|of)\b|"
    r"(?:or|nor|and) (?:(?:"
    + _DEGREE
    + r") )*"
    + _CHANGE
    + r" (?:in|of)\b|"
    + _PARTLY
    + r" (?:\w+ )?"
    + _ENDED
    + r" of|"
    r"unchanged evidence of|positive for|other than|apart from|aside from|besides|except(?: for)?"
    r")"
)
"""Asserts the following finding: "no change in", "partial resolution of", "other than"."""

DOUBT = (
    r"(?:\b(?:can ?not|can't|could not|couldn't|may not|not|difficult to|hard to|impossible to|"
    r"without) (?:be )?(?:\w+ )?(?:exclude\w*|excluding|rul(?:e|ed|ing) out)\b|"
    r"\bno definit(?:e|ive) (?:exclusion|rule)|"
    r"\b(?:on|in) (?:an?|the|her|his) (?:prior|previous|recent)(?: \w+){0,2}? "
    + _IMAGE
    + r"(?=[^;.]*"
    r"\b(?:was|were|had)\b)|"
    r"\br/o\b|\?\s*(?=\w)|\b(?:h/o|hx of|history of)\b|"
    r"\b(?:eval(?:uat\w+)?|assess\w+|detect\w+|sensitiv\w+|interrogat\w+) (?:for|to)\b|"
    r"\b(?:not (?:optimal|sensitive|designed)|suboptimal|limited|insensitive) for\b|"
    r"\b(?:limits?|limiting|precludes?|degrades?) (?:the )?(?:detect|evaluat|assess)\w+ of\b|"
    r"\b(?:possib\w+|may|might|could|can ?not|can't|questionabl[ey]|question|questioned|"
    r"equivocal\w*|suspicious for|suspicion|suspected|suspect|suggest\w*|concern\w*|worrisome|"
    r"exclude|consider\w*|differential|indeterminate|query|evaluate|rule out|if|doubt\w*|"
    r"uncertain|unclear|borderline|perhaps|less likely|correlate|conceivabl[ey]|presum\w+|"
    r"whether|potential\w*|risk|predispos\w+|upper limits|top normal|history|prior|previous\w*|"
    r"preclude|sequela\w*|versus|either(?! (?:side|lung|base))(?=[^,;.]* or\b))\b|\bvs\b\.?|"
    r"\b(?:opacit(?:y|ies)|opacifications?|densit(?:y|ies)|haziness)"
    + _PLACES
    + r"\s*[,:] (?:either )?(?=(?:\w+ ){0,3}?(?!scar|fibros)"
    + _CAUSE
    + r"\w*(?: \w+)?,? or\b(?! (?:\w+ )?(?:scar|fibros))))"
)

ENDING = (
    r"\b(?:" + _ENDED + r" of|(?<!has )(?<!have )(?<!been )resolved|rather than|"
    r"as opposed to|instead of|in lieu of)\b"
)
"""Denies an earlier or assumed finding, whatever its size and side."""

REMOVAL = r"\bremoval of\b"
"""Denies devices only."""

DENIAL = (
    r"\b(?:(?:no longer|not) (?:\w+ly )?" + _SHOWN + r" (?:is|are|was|were)|"
    r"(?:nor|neither) (?:(?:is|are|was|were) there|(?:has|have) there been|"
    r"(?:is|are|was|were)(?= [^,;.]*?\b" + _SHOWN + r"))|"
    r"no longer|no|w/o|without|absent(?:,? as (?:is|are))?|"
    r"absence of|negative|free (?:of|from)|"
    r"clear(?:ed)? (?:of|from)|never|nor|neither|none of|lack of|denies|excludes?|excluded|"
    r"fail(?:s|ed)? to|nothing|non[- ]?visuali[sz]ation of|"
    r"not|un(?:likely|remarkable) for|unlikely(?: to (?:represent|be|reflect|indicate))?)\b"
    r"(?: (?:has|have|(?:represent|reflect|show|demonstrate|suggest|indicate|contain|appear)s?)\b)?"
)

CUES = (
    ("neutral", NEUTRAL),
    ("place", PLACE),
    ("assertion", CHANGE),
    ("doubt", DOUBT),
    ("ending", ENDING),
    ("removal", REMOVAL),
    ("denial", DENIAL),
)
"""(kind, expression) of cues before a mention; the first one wins if two start together."""

# --- scope of a cue -------------------------------------------------------------------------------

CONJUNCTION = (
    r"\b(?:but|however|although|though|except|while|whereas|yet|aside from|other than|apart from|"
    r"there (?:is|are|has|have)|"
    r"secondary to|consistent with|compatible with|positive for|"
    r"in (?:this|a|the) patient with|"
    r"with (?:(?:an?|the|some|\w+ly) )?(?:stable|small|large|persistent|interval|associated|"
    r"unchanged|residual|adjacent|overlying|underlying|new|increas\w+|decreas\w+|improv\w+))\b|"
    r"[;:]|\.(?!\d)"
)
"""Ends the scope of every cue."""

DENIAL_END = (
    r"\b(?:which|causing|caused by|due to|since|because|given|than|after|following|"
    r"status post|s/p|post|despite|"
    r"with (?:mild|moderate|minimal|a|the|bilateral|right|left|chronic|some)|"
    r"consistent with|compatible with|again)\b"
)
"""Also ends the scope of a denial."""

VERB = (
    r"\b(?:is|are|was|were|has|have|had|appears?|remains?|persists?|continues?|shows?|develops?|"
    r"developed|(?<!to )(?:demonstrates?|represents?|reflects?|suggests?)|"
    r"(?<!previously )(?:seen|noted|present|identified)|"
    r"can|could|may|might|should|would|cannot)\b"
)
"""Ends the scope of a denial; marks a separate clause."""

LIST_PREDICATE = (
    r"(?:(?:is|are|was|were|can be|could be|has been|have been|appears?|remains?) )?"
    r"(?:\w+ly |currently |again )?" + _SHOWN + r"\b"
)
"""A predicate that can apply to a whole list: "no effusion or pneumothorax is seen"."""

STATE = (
    r"^(?:(?:\w+ly|otherwise|also|again|now|then|still|there|an?|the|this|its|some) )*"
    r"(?:stable|unchanged|persist\w+|residual|known|improv\w+|decreas\w+|resolving|"
    r"worsen\w+|enlarging|pre-?existing|redemonstrat\w+|again|previously|"
    r"similar|continued|ongoing|status|s/p|possib\w+|probabl[ey]|likely|suspected|may|"
    r"question\w*|cannot|could|interval|post-?\w*|there|this|these|those|it|with|the)\b"
)
"""Starts a new assertion, whatever follows."""

SIZE = (
    r"(?:small|smaller|tiny|trace|mild(?:ly)?|moderate(?:ly)?|minimal(?:ly)?|slight(?:ly)?|subtle|"
    r"\d[\d.x]* ?(?:mm|cm)|\d[\d.]*|an?|increas\w+|low|elevated|extensive|severe|multiple|several|"
    r"few|moderate-sized|small-to-moderate|minor|chronic|healed|old|post\w*)"
)
SIDE = (
    r"(?:right|left|bilateral|bibasilar|bibasal|both|unilateral|retrocardiac|lingular|upper|lower|"
    r"middle|(?:right|left)-sided|basilar|lungs?|heart|aorta|spine)"
)
SIZABLE = r"(?:large|larger|new|big|widespread|diffuse|patchy|dense)"
"""Starts a new assertion, unless "or" closes the list after it ("no consolidation, large effusion
or pneumothorax")."""

STATE_AFTER = (
    r"\w (?:\w+ly )?(?:unchanged|stable|smaller|larger|improved|increased|decreased|worsened|"
    r"persist\w*|resolving|enlarged)\b"
)
"""Describes the preceding finding in the same item: "effusion unchanged"."""

# --- text after a mention -------------------------------------------------------------------------

_BEFORE = r" (?:on|in|at) (?:(?:the|any|most|recent) )*(?:prior|previous|earlier|older|comparison)"
_NOUNS = (
    r"(?:(?!\b(?:is|are|has|have|with|without|no|not|but|while|although|w/o|"
    r"and (?:the|an?) [^,;.]*?\b(?:is|was|has))\b)[^,;.:]){0,60}?"
)
_ASIDE = (
    r"(?:, (?:which|as|previously|seen|noted|present)\b[^,;.]{0,60}, |"
    r",(?! (?:and|or|nor|but|no|without)\b)[^,;.:]{1,60}, (?=(?:has|have|is|are|was|were)\b))?"
)
_FELT = r"(?: \w+ly)? (?:felt|thought|considered|believed|deemed|judged)(?: to be)?(?: \w+ly)?"
_GROWS = (
    r"(?! (?:\w+ly )?(?:enlarg|increas|decreas|grow|chang|progress|worsen|improv|as|large|"
    r"massive|tension|so|quite)\w*)"
)
_BE = r"(?:is|are|was|were|has been|have been|has|have|had|remains?|appears?|now)"
_NOW = r"(?: (?:now|since|also|again|currently|otherwise|(?!near|part|incomp|most|large)\w+ly))*"

DENIED_AFTER = (
    r"^" + _NOUNS + _ASIDE + r"(?:"
    r"\b" + _BE + _NOW + r" (?:no longer" + _GROWS + r"|absent|resolved|cleared|excluded|ruled out|"
    r"gone|removed|withdrawn|extubated|disappeared|negative|unlikely(?! to)|"
    r"re-? ?(?:expanded|inflated|aerated))\b|"
    r"(?:\b(?:is|are|was|were))?" + _FELT + r" unlikely\b|"
    r"\b(?:(?:completely|entirely|totally|fully) )?(?<!not )(?:resolved|cleared)\s*[.,;]?$|"
    r"\bunlikely(?! to)\b|\bno longer\b" + _GROWS + r"|"
    r"(?:\b(?:"
    + _BE
    + r"|do|does|did)\b)?(?: \w+ly)?(?: not| cannot| can't|n't)(?: (?:be|been|being))?"
    r"(?: (?:clearly|definite\w*|readily|confidently|currently|again|actually|radiographically|"
    r"convincingly))?"
    r" (?:" + _SHOWN + r"|developed|enlarged|suspected|wide\w*|large|recurred)\b"
    r"(?!" + _BEFORE + r")|"
    r"\b(?:do|does|did) not (?:persist|recur)|"
    r"\bremoval\b)|"
    r"^[^.;:,]{0,25}\s*(?::|=| -+|--+)\s*(?:none|no|absent|negative|nil|not (?:seen|present|"
    r"identified|evident|visuali[sz]ed|detected)|normal|clear|0|resolved)\b(?! (?:" + _DEGREE + r"|"
    r"change|interval|longer \w+ing))|"
    r"^(?:(?!\b(?:with|and)\b)[^,;.]){0,40}?\b" + _BE + r"(?: \w+)? "
    r"(?:within (?:\w+ )?(?:normal limits|limits of normal)|normal)\b|"
    r"^\s*\(?(?:none|absent)\b"
)

DOUBTED_AFTER = (
    r"^" + _NOUNS + r"(?:," + _NOUNS + r"(?:,? (?:or|and)\b)" + _NOUNS + r")?"
    r"\b(?:(?:is|are|remains?) (?:\w+ )?"
    r"(?:possible|suspected|questioned|questionable|not (?:\w+ly )?excluded|considered|uncertain|"
    r"equivocal|indeterminate|in (?:question|the differential)|difficult to|hard to|suggested|"
    r"(?:severely |somewhat )?limited(?! to)|obscured|a (?:consideration|possibility|concern))|"
    r"(?:can ?not|can't|could not|may not|not|difficult to|hard to) (?:\w+ )?(?:be )?(?:\w+ )?"
    r"(?:exclude\w*|ruled out|assess\w*|evaluat\w*|determin\w*)|"
    r"(?:is|are|was|were) not (?:well|optimally|adequately|fully|sufficiently|as well|reliably)[ -]"
    r"(?:seen|visuali[sz]ed|evaluated|assessed|appreciated|delineated|demonstrated|defined|shown)"
    r"(?!" + _BEFORE + r")|"
    r"(?:would|could|may|might|should) (?:also |well )?(?:be(?! (?:due|secondary|related|"
    r"caused|explained)\b|(?: \w+){0,2}? " + _CAUSE + r")|have|look)|possible\b|suspected|"
    r"in the differential|"
    r"(?:not|n't) (?:completely |entirely )?excluded)|"
    r"^[^.;:,]{0,25}\s*(?::|=| -+|--+)\s*(?:possib\w+|questionabl[ey]|question|suspected|equivocal|"
    r"indeterminate|uncertain|borderline|maybe|cannot|can't|unclear)\b|"
    r"^" + _PLACES + r" (?:versus\b|vs\b\.?)(?! (?:the |an? )?(?:prior|previous|old|recent|earlier|"
    r"last|yesterday))|"
    r"^(?:(?!\b(?:or|and)\b)[^,;.:]){0,40}?\bless likely(?=\s*(?:[.,;)]|$))|"
    r"^[^;.]{0,60}?\bbut (?:is )?(?:not|can ?not be|could not be) (?:\w+ly )?"
    r"(?:excluded|ruled out)\b|"
    r"^[^.;:,?]{0,40}\?|^[^.;:,?]{0,40},? if (?:any|present)\b"
)

_BUT = (
    r"(?:other than|apart from|aside from|besides|except(?:ing)?(?: for)?|beyond|"
    r"with the exception of)"
)
_WHERE = r"(?:lobes?|bas(?:e|es)|ap(?:ex|ices)|lingula|angles?|sides?|zones?|region|sulcus|fissure)"
_AMOUNT = (
    r"(?:small|large|moderate|mild|minimal|tiny|trace|extensive|unchanged|stable|persistent|"
    r"present)"
)
EXEMPTED_AFTER = (
    r"^[^,;.]{0,40}\b" + _BUT + r"\b[^;.]{0,60}\b(?:ones?|that|those)\b|"
    r"^(?:(?!\b(?:or|and|nor)\b)[^;.]){0,40}?\b" + _BUT + r" (?:(?:perhaps|maybe|\w+ly) )?"
    r"(?:(?:in|at|on|over|within|along)\b|(?:(?:the|an?|some) )?(?:(?:right|left|upper|lower|"
    r"middle|costophrenic|small|tiny|trace|minimal|apical|basal|lateral|medial|minor|major|"
    r"posterior) )*"
    r"(?:" + _WHERE + r"|components?|amount|focus|area)\b)|"
    r"^[^.]{0,60}?(?:[,;]|\b(?:and|but|while|whereas)) (?:on|at|in) the (?:right|left)(?: \w+)?,? "
    r"(?:(?:it|they) (?:persists?|(?:is|are|was|were|remains?|appears?)(?! (?:\w+ly )?(?:no|not|"
    r"absent|resolved|normal|clear|gone|negative)))\b|"
    r"(?:there (?:is|are|remains?) )?(?:an?|some) (?:\w+ ){0,3}ones?\b|"
    r"there (?:is|are|remains?) " + _AMOUNT + r" (?:\w+ )?ones?\b)|"
    r"^[^.,;]{0,30}\b(?:right|left)[^.,;]{0,15}[,;] (?:(?:and|but) )?(?:"
    + _AMOUNT
    + r" (?:on|at|in) the (?:right|left)(?: \w+)?\s*(?:[.,;]|$)|"
    r"(?:the )?(?:right|left) (?:(?:one|side) )?(?:is|remains) " + _AMOUNT + r"\b)"
)
"""A denial with an exception or of one side: "no effusion apart from a trace left one", "no opacity
except at the base", "no effusion on the right, on the left it is small"."""

DOUBTED_INSIDE = r"\b(?:may|might|could|possibl[ey]|questionabl[ey]|borderline|perhaps)\b"
"""Doubt within a mention of several words ("the heart may be enlarged")."""

DENIED_INSIDE = r"\b(?:not|no longer)\b(?! (?:changed|significantly changed))"
