"""Drives the coordinator's page in headless Chromium, as a person would.

    drive.py live  URL TOKEN PICTURES   a job that trains, one that has failed, two over each other
    drive.py crowd URL TOKEN PICTURES   1,000 jobs and 1,000 workers
    drive.py link  URL TOKEN PICTURES   the address that a launch prints

Says what it saw as JSON; any fault ends it with a message.
"""

import json
import pathlib
import sys

import axe_core_python
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

LIMIT_SECONDS = 60
MOST_PAGE_BYTES = 200_000
AXE = pathlib.Path(axe_core_python.__file__).with_name("axe.min.js").read_text()

mode, url, token, pictures = sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])
pictures.mkdir(parents=True, exist_ok=True)

options = webdriver.ChromeOptions()
for argument in [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1500",
]:
    options.add_argument(argument)
options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
service = webdriver.ChromeService("/usr/bin/chromedriver")
browser = webdriver.Chrome(options=options, service=service)
wait = WebDriverWait(browser, LIMIT_SECONDS, poll_frequency=0.1)


def find(selector):
    return wait.until(lambda b: b.find_element(By.CSS_SELECTOR, selector))


def until(what, condition):
    wait.until(lambda b: condition(), message=f"{what}: nothing after {LIMIT_SECONDS} s")


def text(selector="main"):
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def picture(name):
    browser.save_screenshot(str(pictures / f"{name}.png"))


def go(address):
    browser.execute_script("location.hash = arguments[0]", address)


def path_of(title):
    """The drawn line of a chart."""
    return browser.execute_script(
        """for (const figure of document.querySelectorAll('figure'))
             if (figure.querySelector('figcaption').firstChild.textContent === arguments[0])
               return [...figure.querySelectorAll('path.line')].map((path) => path.getAttribute('d'));
           return [];""", title)


def accessible(name):
    """No fault that axe-core knows of, in either theme."""
    for theme in ["light", "dark"]:
        browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        browser.execute_script(AXE)
        violations = browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        faults = [f"{v['id']}: {node['html'][:160]}" for v in violations for node in v["nodes"]]
        assert not faults, f"{name}, {theme}: " + "; ".join(faults)
    browser.execute_script("delete document.documentElement.dataset.theme")


def link():
    """The address that a launch prints shows its job."""
    browser.get(url)
    until("the job is shown", lambda: text("h1") == "Jobs" and "running" in text())
    assert "token" not in browser.current_url, browser.current_url
    go("#/jobs/test")
    until("a curve is drawn", lambda: any(path.count("L") >= 3 for path in path_of("Training loss")))


def log_in():
    browser.get(url)
    find("#token").send_keys("not a token" + Keys.ENTER)
    until("a wrong token is refused", lambda: "not, or no longer, valid" in text("[role=alert]"))
    accessible("login")
    field = find("#token")
    field.clear()
    field.send_keys(token + Keys.ENTER)
    until("jobs are shown", lambda: text("h1") == "Jobs")
    cookies = browser.get_cookies()
    assert [(c["name"], c["httpOnly"], c["sameSite"]) for c in cookies] == [("tunefleet_token", True, "Strict")], cookies


def live():
    log_in()
    until("all jobs are there", lambda: all(name in text() for name in ["full", "qlora", "broken"]))
    until("the stream is up", lambda: text("#link") == "live")
    accessible("jobs")
    picture("jobs")

    go("#/jobs/full")
    until("a curve is drawn", lambda: any(path.count("L") >= 3 for path in path_of("Training loss")))
    before = path_of("Training loss")[0].count("L") + path_of("Training loss")[0].count("M")
    until("the curve moves", lambda: path_of("Training loss")[0].count("L") > before + 3)
    for title in ["Learning rate", "Tokens per second", "Gradient norm"]:
        assert path_of(title), f"{title} is empty"
    assert browser.find_elements(By.CSS_SELECTOR, "progress") == [] and "qlora" not in text("dl.facts")
    chart = find("figure svg[tabindex]")
    chart.send_keys(Keys.HOME)
    until("the keys read values", lambda: text("figure output").startswith("1: "))
    chart.send_keys(Keys.ARROW_RIGHT)
    assert "Training loss" in chart.get_attribute("aria-label") and "lowest" in chart.get_attribute("aria-label")
    find("#follow").click()
    until("log lines come", lambda: len(text("pre.log")) > 20)
    accessible("job")
    find("#follow").click()
    picture("job")

    go("#/jobs/broken")
    until("the cause is shown", lambda: "signal 9 (SIGKILL)" in text(".cause"))
    assert "train failed (signal)" in text(".cause") and "rank 1 on worker w0" in text(".cause"), text(".cause")
    until("its attempt is listed", lambda: "aborted by peer" in text())
    accessible("failed job")
    picture("failed")

    go("#/compare/full/qlora")
    until("both curves are drawn", lambda: len(path_of("Training loss")) == 2)
    until("their methods are named", lambda: "full (full)" in text(".legend") and "qlora (qlora)" in text(".legend"))
    [button for button in browser.find_elements(By.CSS_SELECTOR, ".bar button") if button.text == "time"][0].click()
    until("both curves are drawn over time", lambda: len(path_of("Training loss")) == 2)
    accessible("compare")
    picture("compare")
    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
    picture("compare-dark")
    browser.execute_script("delete document.documentElement.dataset.theme")

    go("#/workers")
    until("the worker is there", lambda: "w0" in text("main"))
    accessible("workers")
    picture("workers")

    # By keyboard alone: skip link, then the jobs.
    go("#/jobs")
    until("jobs are shown", lambda: text("h1") == "Jobs")
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        # Rows are drawn anew while this goes on: the element itself is not held.
        reached.append(browser.execute_script(
            "const a = document.activeElement; return a.textContent || a.getAttribute('aria-label') || a.tagName"))
        if reached[-1] == "full":
            ActionChains(browser).send_keys(Keys.ENTER).perform()
            break
    until(f"the keyboard reaches a job: {reached}", lambda: text("h1") == "full")

    browser.find_element(By.ID, "logout").click()
    until("logged out", lambda: text("h1") == "Log in")
    assert browser.get_cookies() == [], browser.get_cookies()


def crowd():
    log_in()
    until("all jobs are drawn", lambda: text("#count") == "1000 of 1000")
    find("input[type=search]").send_keys("job-099")
    took = []
    until("ten are left", lambda: text("#count") == "10 of 1000")
    browser.execute_script("document.querySelector('input[type=search]').value = ''; "
                           "document.querySelector('input[type=search]').dispatchEvent(new Event('input'))")
    for address, count in [("#/workers", "1000 of 1000"), ("#/jobs", "1000 of 1000")] * 3:
        # From the click to the next frame that is painted.
        took.append(browser.execute_async_script(
            """const done = arguments[arguments.length - 1], began = performance.now();
               location.hash = arguments[0];
               requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));""", address))
        until(f"{address} is drawn", lambda: text("#count").startswith(count))
    slowest = browser.execute_async_script(
        """const done = arguments[0]; let slowest = 0, last = performance.now(); const end = last + 3000;
           const frame = (now) => { slowest = Math.max(slowest, now - last); last = now;
             if (now < end) requestAnimationFrame(frame); else done(slowest); };
           requestAnimationFrame(frame);""")
    picture("crowd")
    print(json.dumps({"views_ms": took, "slowest_frame_ms": slowest}), flush=True)
    assert max(took) < 1000 and slowest < 500, (took, slowest)


try:
    {"live": live, "crowd": crowd, "link": link}[mode]()
    # A wrong token was tried: that one answer is meant.
    log = [entry for entry in browser.get_log("browser") if "401" not in entry["message"]]
    faults = [entry["message"] for entry in log if entry["level"] in ("WARNING", "SEVERE")]
    assert not faults, faults
    size = browser.execute_script(
        """return [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
             .filter((entry) => !entry.name.includes('/api/')).reduce((sum, entry) => sum + entry.decodedBodySize, 0);""")
    assert 10_000 < size < MOST_PAGE_BYTES, size
    print(json.dumps({"page_bytes": size}))
except BaseException:
    picture("fault")
    print(text()[:3000], file=sys.stderr)
    print(browser.get_log("browser"), file=sys.stderr)
    raise
finally:
    browser.quit()
