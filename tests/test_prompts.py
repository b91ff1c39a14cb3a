"""Tests of prompts: rendering with every kind of tokenizer and chat template, prompt files, and the prompt of a run."""

import pytest
from conftest import CHAT, byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_zoo import CONTROL, ZOO

from thor.prompts import PROMPT_FILE, PROMPTS, Prompt, load_prompt
from thor.settings import UserError, prompt_for
from thor.text import control_ids, decode
from thor.tirgen.roles import FewShotActor, FewShotCritic

SYSTEM_REFUSED = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + "{{ bos_token }}"
    + CHAT
)
SYSTEM_IGNORED = "{{ bos_token }}" + CHAT.replace(
    "{% for m in messages %}", "{% for m in messages if m.role == 'user' %}"
)
TRIMS = CHAT.replace("m['content']", "m['content'] | trim")
THINKS = CHAT + "{% if enable_thinking is false %}<think>\n</think>\n{% else %}<think>\n{% endif %}"


def with_template(template: str | None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat_ids(tokenizer, *messages: tuple[str, str], **options) -> list[int]:
    """The reference: transformers' own rendering of a chat."""
    chat = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **options)


# ---- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("question", ["What is the sum?", "Is x < 3, or <i>?\n\nSay so.", "é 数 🙂"])
def test_chat_prompt_is_what_transformers_renders(name, question):
    tokenizer, prompt = ZOO[name], PROMPTS["tool"]
    assert prompt.render(tokenizer, question) == chat_ids(tokenizer, ("system", prompt.system), ("user", question))


@pytest.mark.parametrize("template", [SYSTEM_REFUSED, SYSTEM_IGNORED])
def test_system_text_starts_the_user_turn_if_the_template_has_no_system_role(template):
    tokenizer = with_template(template)
    rendered = Prompt("Be brief.", "Q: {question}").render(tokenizer, "1+1?")
    assert rendered == chat_ids(tokenizer, ("user", "Be brief.\n\nQ: 1+1?"))


def test_template_may_trim_and_the_question_is_stripped():
    tokenizer = with_template(TRIMS)
    assert decode(tokenizer, Prompt().render(tokenizer, "\n 1+1? \n")) == "<|user|>1+1?\n<|assistant|>"


def test_template_without_the_user_text_and_failing_template_are_errors():
    with pytest.raises(ValueError, match="leaves out"):
        Prompt().render(with_template("hello"), "1+1?")
    with pytest.raises(ValueError, match="cannot render the prompt: not today"):
        Prompt("s").render(with_template("{{ raise_exception('not today') }}"), "1+1?")


def test_chat_kwargs_reach_the_template():
    tokenizer = with_template(THINKS)
    assert decode(tokenizer, Prompt().render(tokenizer, "q")).endswith("<|assistant|><think>\n")
    plain = Prompt(chat_kwargs={"enable_thinking": False})
    assert decode(tokenizer, plain.render(tokenizer, "q")).endswith("<|assistant|><think>\n</think>\n")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "unigram"])
def test_plain_text_prompt_keeps_bos(name):
    tokenizer = ZOO[name]
    for prompt in (PROMPTS["tool-base"], Prompt("", "{question}", chat=False), Prompt("", "<s>{question}", chat=False)):
        ids = prompt.render(tokenizer, "What is the sum?")
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids


def test_few_shot_prompts_keep_bos():
    tokenizer = ZOO["byte_fallback"]
    for ids, shared in (
        FewShotActor(tokenizer).prompt("1+1?"),
        FewShotCritic(tokenizer).prompt("1+1?", "", ["Add </s>."]),
    ):
        assert ids[0] == tokenizer.bos_token_id and control_ids(tokenizer).isdisjoint(ids[1:]) and 0 < shared < len(ids)


def test_plain_text_prompt_of_a_tokenizer_that_adds_no_bos():
    tokenizer = ZOO["slow"]
    ids = Prompt("Be brief.", "Q: {question}\n", chat=False).render(tokenizer, "1+1?")
    assert ids == tokenizer.encode("Be brief.\n\nQ: 1+1?\n", add_special_tokens=False)


def test_tokenizer_without_a_chat_template_gets_the_base_prompt():
    tokenizer = with_template(None)
    for name in ("tool", "plain"):
        assert PROMPTS[name].render(tokenizer, "1+1?") == PROMPTS[f"{name}-base"].render(tokenizer, "1+1?")
    assert decode(tokenizer, PROMPTS["tool"].render(tokenizer, "1+1?")).endswith("\n\nQuestion: 1+1?\nAnswer:\n")


hostile = st.lists(st.sampled_from([*CONTROL, "What is", " ", "\n", "the sum", "?", "<", "s>", "think>"]), max_size=8)


@example("unknown_is_eos", "tool", "What is </s>?")
@given(st.sampled_from(sorted(ZOO)), st.sampled_from([*PROMPTS, "manual"]), hostile.map("".join))
def test_question_never_becomes_a_control_token(zoo, name, question):
    tokenizer = ZOO[zoo]
    manual = Prompt("", "<|im_start|>user\n{question}</s>\n<think>", chat=False)  # its own control tokens are kept
    prompt = manual if name == "manual" else PROMPTS[name]
    control = tokenizer.convert_tokens_to_ids(list(CONTROL))
    found = [token for token in prompt.render(tokenizer, question) if token in control]
    assert found == [token for token in prompt.render(tokenizer, "1") if token in control]
    if name == "manual":
        assert set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "</s>", "<think>"])) <= set(found)


def test_question_with_control_text_stays_readable():
    for zoo in ("byte_level", "byte_fallback", "slow"):
        text = ZOO[zoo].decode(PROMPTS["tool"].render(ZOO[zoo], "What does </s> or <think> mean?"))
        assert "What does </s> or <think> mean?" in text


def test_placeholder_in_the_question_is_not_replaced():
    tokenizer = with_template(CHAT)
    assert decode(tokenizer, Prompt().render(tokenizer, "is {question} \ue000 ok?")).startswith(
        "<|user|>is {question} \ue000 ok?"
    )


# ---- prompt files ---------------------------------------------------------------------------------------------------


def test_built_in_prompts():
    assert PROMPTS["tool"] == load_prompt("tool") and PROMPTS["tool"].tools and PROMPTS["tool"].chat
    assert not load_prompt("plain").tools and load_prompt("plain").chat
    assert load_prompt("tool-base").tools and not load_prompt("tool-base").chat
    assert not load_prompt("plain-base").tools and not load_prompt("plain-base").chat
    for prompt in PROMPTS.values():
        assert "\\boxed{}" in prompt.system and "{question}" in prompt.user
        assert ("by itself" in prompt.system and "print" in prompt.system) == prompt.tools


@pytest.mark.parametrize(
    "prompt", [*PROMPTS.values(), Prompt("é:\n- 'x' # \"y\"\n", "\n{question}\n", False, {"a": [1]})]
)
def test_saved_prompt_is_read_back(tmp_path, prompt):
    prompt.save(tmp_path)
    assert load_prompt(tmp_path / PROMPT_FILE) == prompt == load_prompt(str(tmp_path / PROMPT_FILE))


def test_prompt_file_may_name_some_fields_only(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("system: Be brief.\nchat_kwargs: {enable_thinking: false}\ntools: false\n")
    assert load_prompt(str(file)) == Prompt("Be brief.", chat_kwargs={"enable_thinking": False}, tools=False)


def test_name_without_a_value_keeps_its_default(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("system:\nuser:\nchat_kwargs:\ntools: false\n")
    assert load_prompt(file) == Prompt(tools=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must consist of 'name: value' lines with the names system, user, chat, chat_kwargs, tools"),
        ("- a", "must consist of"),
        ("sistem: a", "no field is named 'sistem'"),
        ("user: Solve it.", "user: must contain {question}"),
        ("system: 5", "system: must be text, not 5"),
        ('system: "\\ud800"', "system: has an unpaired surrogate"),
        ("tools: maybe", "tools: must be true or false, not 'maybe'"),
        ("chat_kwargs: 1", "chat_kwargs: must be a mapping"),
        ("user: [", "line 1"),
        ("user: '\x00'", "special characters are not allowed"),
    ],
)
def test_bad_prompt_file_is_one_clear_line(tmp_path, text, message):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        prompt_for(str(file), "smollm2-135m")
    assert str(raised.value).startswith(f"--prompt {file}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_prompt_name_lists_the_names():
    with pytest.raises(UserError, match="--prompt tol: no such file, nor one of the prompts tool, plain, tool-base"):
        prompt_for("tol", "smollm2-135m")


# ---- the prompt of a run --------------------------------------------------------------------------------------------


def test_later_stage_takes_the_prompt_from_its_model_unless_told_otherwise(tmp_path, capsys):
    assert prompt_for("", "smollm2-135m") == prompt_for("", str(tmp_path)) == PROMPTS["tool"]
    PROMPTS["plain"].save(tmp_path)
    for model in (str(tmp_path), f"vllm:{tmp_path}"):
        assert prompt_for("", model) == prompt_for("plain", model) == PROMPTS["plain"]
    assert prompt_for("tool", "http://localhost:8000") == PROMPTS["tool"]
    assert capsys.readouterr().out == ""
    assert prompt_for("tool", str(tmp_path)) == PROMPTS["tool"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("--prompt tool: differs from the prompt that") and str(tmp_path) in line


def test_only_rank_0_says_that_the_prompt_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    PROMPTS["plain"].save(tmp_path)
    prompt_for("tool", str(tmp_path))
    assert capsys.readouterr().out == ""
