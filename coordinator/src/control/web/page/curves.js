// The logged values of one job: what there is, then what comes.

// Points that are kept; beyond them every second one goes.
const MOST = 4000;

export class Curves {
  constructor(job) {
    this.job = job;
    this.steps = [];
    this.evals = [];
    this.attempts = [];
  }

  async load() {
    const answer = await fetch(`/api/jobs/${encodeURIComponent(this.job)}/curves`);
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? answer.statusText);
    Object.assign(this, await answer.json());
    return this;
  }

  // Takes a job event; whether it changes a curve.
  take(event) {
    if (event.kind === "step") {
      this.begin(event.attempt, event.step);
      this.steps.push({ step: event.step, unix_ms: event.unix_ms, tokens: event.tokens, loss: event.loss, grad_norm: event.grad_norm,
        learning_rate: event.learning_rate, tokens_per_second: event.tokens_per_second });
      if (this.steps.length > MOST) this.steps = this.steps.filter((_, index) => index % 2 === 1);
      return true;
    }
    if (event.kind === "evaluated") {
      this.evals.push({ step: event.step, unix_ms: event.unix_ms, loss: event.loss });
      return true;
    }
    return false;
  }

  // What an attempt makes again replaces what was made before.
  begin(attempt, step) {
    if (this.attempts[this.attempts.length - 1]?.attempt === attempt) return;
    this.attempts.push({ attempt, step });
    this.steps = this.steps.filter((point) => point.step < step);
    this.evals = this.evals.filter((point) => point.step < step);
  }

  // Points of a value over `axis`: step, time (hours since the first) or tokens.
  points(field, axis) {
    return this.over(this.steps, field, axis);
  }

  evalPoints(axis) {
    return this.over(this.evals, "loss", axis);
  }

  over(values, field, axis) {
    const began = this.steps[0]?.unix_ms ?? 0;
    const tokens = (step) => {
      const at = this.steps.find((point) => point.step >= step) ?? this.steps[this.steps.length - 1];
      return at?.tokens ?? 0;
    };
    const x = {
      step: (value) => value.step,
      time: (value) => (value.unix_ms - began) / 3600000,
      tokens: (value) => value.tokens ?? tokens(value.step),
    }[axis];
    return values.map((value) => [x(value), value[field] ?? NaN]);
  }

  marks(axis) {
    if (axis !== "step") return [];
    return this.attempts.slice(1).map(({ attempt, step }) => ({ x: step, label: `attempt ${attempt}` }));
  }
}
