"""Our labelling interface: what a person sees of a task and is asked. The data and the names are in core/review.py.

Only tags that the Community edition draws. A list that is empty draws nothing, so one interface serves answers with and
without further choices. Text stands in `Text`, which escapes it: answers may hold HTML.
"""

from collections.abc import Mapping
from typing import Any

from vllm_batch_dagster.core.review import ISSUE_NAMES, MAX_RATING, VERDICTS, Control

_STYLE = """
.vb { max-width: 64rem; }
.vb h6, .vb .ant-typography { font-size: 0.95rem; line-height: 1.4; margin: 0.3em 0; }
.vb-facts { opacity: 0.7; font-size: 0.85em; margin-bottom: 0.6em; }
.vb-turn { border-left: 3px solid #c4c9d1; padding: 0 0.9em; margin-bottom: 0.6em; }
.vb-answer { background: rgba(75, 116, 201, 0.08); border-left: 3px solid #4b74c9; padding: 0.2em 0.9em;
             margin-bottom: 0.6em; }
.vb-ask { border-top: 1px solid rgba(128, 128, 128, 0.3); padding-top: 0.4em; margin-top: 0.6em; }
"""


def _choices(names: tuple[str, ...]) -> str:
    return "".join(f'<Choice value="{name}"/>' for name in names)


INTERFACE = f"""<View className="vb">
  <Style>{_STYLE}</Style>
  <View className="vb-facts"><Text name="facts" value="$facts" selectionEnabled="false"/></View>
  <Repeater on="$messages" indexFlag="{{{{m}}}}">
    <View className="vb-turn">
      <Header value="$messages[{{{{m}}}}].role" size="6"/>
      <Text name="message_{{{{m}}}}" value="$messages[{{{{m}}}}].content" selectionEnabled="false"/>
    </View>
  </Repeater>
  <View className="vb-answer">
    <Header value="Answer A" size="6"/>
    <Text name="answer" value="$answer" selectionEnabled="false"/>
  </View>
  <Repeater on="$others" indexFlag="{{{{o}}}}">
    <View className="vb-answer">
      <Header value="$others[{{{{o}}}}].title" size="6"/>
      <Text name="other_{{{{o}}}}" value="$others[{{{{o}}}}].text" selectionEnabled="false"/>
    </View>
  </Repeater>
  <Repeater on="$compare" indexFlag="{{{{c}}}}"><Header value="$compare[{{{{c}}}}].title" size="6"/></Repeater>
  <Choices name="preference" toName="answer" choice="single" showInLine="true" value="$options"/>
  <View className="vb-ask">
    <Header value="How good is answer A?" size="6"/>
    <Rating name="rating" toName="answer" maxRating="{MAX_RATING}"/>
    <Choices name="verdict" toName="answer" choice="single" showInLine="true" required="true">
      {_choices(VERDICTS)}
    </Choices>
    <Header value="What is wrong with it?" size="6"/>
    <Choices name="issues" toName="answer" choice="multiple" showInLine="true">{_choices(ISSUE_NAMES)}</Choices>
  </View>
  <View className="vb-ask">
    <Header value="Answer A, corrected" size="6"/>
    <TextArea name="correction" toName="answer" rows="6" editable="true" maxSubmissions="1"/>
  </View>
</View>"""


def read_controls(project: Mapping[str, Any]) -> Mapping[str, Control]:
    """Return the questions of a project, ours or another, from the server's own reading of its interface."""
    parsed: Mapping[str, Mapping[str, Any]] = project.get("parsed_label_config") or {}
    return {name: _control(each) for name, each in parsed.items()}


def _control(parsed: Mapping[str, Any]) -> Control:
    labels = () if parsed.get("dynamic_labels") else tuple(str(label) for label in parsed.get("labels") or ())
    return Control(str(parsed.get("type", "")).lower(), tuple(parsed.get("to_name") or ()), labels)
