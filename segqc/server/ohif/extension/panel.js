/**
 * The panel beside the slices: a custom element that draws a `Session`, and needs nothing of OHIF.
 *
 * @typedef {import('./session.js').Session} Session
 * @typedef {import('./server.js').Interval} Interval
 * @typedef {import('./server.js').Version} Version
 */
import { dice, h, icon, ml, plural, put, s, when } from './dom.js';
import { toolInHand } from './ohif.js';
import { style } from './style.js';

export const ELEMENT = 'segqc-panel';

const REASONS = ['Poor image quality', 'Not sure what is right', 'No time now', 'Wrong scan'];
const SOURCES = /** @type {Record<string, string>} */ ({
  network: 'network',
  'pseudo-label': 'pseudo-label',
  import: 'imported',
  restored: 'restored',
  consensus: 'consensus',
  removal: 'removed',
});
const STRIP = { height: 64, top: 4, bottom: 10 };

/** @typedef {'skip' | 'leave' | 'load' | 'restore' | null} Question what is asked before something is done */

class Panel extends HTMLElement {
  /** The work that is shown; set before the first panel is made. @type {Session} */
  static session;

  constructor() {
    super();
    this.session = Panel.session;
    /** @type {Question} */
    this.question = null;
    /** what is done when the question is answered */
    this.answer = () => {};
    this.reason = '';
    /** the question that is drawn @type {Question} */
    this.asked = null;
    /** the slice and the tool that are drawn */
    this.moved = '';
    /** the box of the proposal that is drawn as looked at @type {import('./proposal.js').ProposedBox | null} */
    this.chosen = null;
    const root = this.attachShadow({ mode: 'open' });
    root.adoptedStyleSheets = [style];
    this.parts = {
      head: h('section', { class: 'plain' }),
      notices: h('div', { class: 'notices', role: 'status', 'aria-live': 'polite' }),
      question: h('section', { 'aria-label': 'Before you go on' }),
      check: h('section', { 'aria-label': 'What is submitted' }),
      estimate: h('section', { 'aria-label': 'Estimate' }),
      slices: h('section', { 'aria-label': 'Slices' }),
      proposal: h('section', { 'aria-label': 'Proposal' }),
      tools: h('section', { 'aria-label': 'Paint' }),
      history: h('section', { 'aria-label': 'History' }),
    };
    this.#makeTools();
    root.append(...Object.values(this.parts));
    // OHIF sees keys as pressed on the whole panel, and would take letters that are typed here for its own
    for (const type of ['keydown', 'keypress', 'keyup']) {
      root.addEventListener(type, event => isTyping(event) && event.stopPropagation());
    }
    this.draw = this.draw.bind(this);
    this.onKey = this.onKey.bind(this);
  }

  connectedCallback() {
    this.session.addEventListener('change', this.draw);
    window.addEventListener('keydown', this.onKey, true);
    window.cornerstone.eventTarget.addEventListener('CORNERSTONE_STACK_NEW_IMAGE', this.draw);
    this.watched = setInterval(() => this.#drawWhenMoved(), 150);
    this.draw();
  }

  disconnectedCallback() {
    this.session.removeEventListener('change', this.draw);
    window.removeEventListener('keydown', this.onKey, true);
    window.cornerstone.eventTarget.removeEventListener('CORNERSTONE_STACK_NEW_IMAGE', this.draw);
    clearInterval(this.watched);
  }

  /** Scrolling and the viewer's own tools tell nobody of it who is outside of the viewports. */
  #drawWhenMoved() {
    const now = `${this.session.instance} ${this.session.services && toolInHand(this.session.services)}`;
    if (now !== this.moved) {
      this.moved = now;
      this.draw();
    }
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const { session } = this;
    if (isTyping(event) || session.phase !== 'ready') {
      return;
    }
    const key = event.key.toLowerCase();
    const isCommand = event.ctrlKey || event.metaKey;
    /** @type {(() => unknown) | undefined} */
    let action;
    if (isCommand && !event.altKey && key === 'z') {
      action = () => (event.shiftKey ? session.mask?.redo() : session.mask?.undo());
    } else if (isCommand && !event.altKey && !event.shiftKey && key === 'y') {
      action = () => session.mask?.redo();
    } else if (!isCommand && !event.altKey && !event.shiftKey && key === 'n') {
      action = () => session.goOn(1);
    } else if (!isCommand && !event.altKey && !event.shiftKey && key === 'p') {
      action = () => session.goOn(-1);
    }
    if (action) {
      event.preventDefault();
      event.stopImmediatePropagation();
      action();
    }
  }

  draw() {
    const { parts, session } = this;
    const focusAgain = this.#rememberFocus();
    const isReady = session.phase === 'ready';
    this.#drawHead();
    this.#drawNotices();
    this.#drawQuestion();
    this.#drawCheck();
    for (const part of [parts.estimate, parts.slices, parts.proposal, parts.tools, parts.history]) {
      part.hidden = !isReady;
    }
    if (isReady) {
      this.#drawEstimate();
      this.#drawSlices();
      this.#drawProposal();
      this.#drawTools();
      this.#drawHistory();
    }
    focusAgain();
  }

  /** What is made anew loses the keyboard's focus; the returned function gives it to what took the place. */
  #rememberFocus() {
    const focused = this.shadowRoot?.activeElement;
    const part = Object.values(this.parts).find(one => one.contains(focused ?? null));
    const name = (/** @type {Element} */ element) => element.getAttribute('aria-label') ?? element.textContent;
    return () => {
      if (focused && part && !focused.isConnected) {
        const candidates = /** @type {NodeListOf<HTMLElement>} */ (part.querySelectorAll('button, input, summary'));
        [...candidates].find(element => name(element) === name(focused))?.focus();
      }
    };
  }

  // ------------------------------------------------------------------------------------------------------------- head

  #drawHead() {
    const { session } = this;
    const { scan, busy, phase } = session;
    const title = {
      loading: 'Opening the scan …',
      ready: scan?.title ?? '',
      'none-left': 'Nothing left for you',
      unknown: 'Not a scan of this server',
      failed: 'The scan could not be opened',
    }[phase];
    const told = {
      loading: '',
      ready: this.#standing(),
      'none-left': session.noneLeft,
      unknown: 'This study is not in the folder that SegQC serves. Take the next scan instead.',
      failed: '',
    }[phase];
    const changes = session.mask?.changes;
    const isOpen = phase === 'ready';
    put(this.parts.head, 
      h(
        'div',
        { class: 'row' },
        h('span', { class: 'title name grow', title: phase === 'ready' ? scan?.scan : title }, title),
        Boolean(busy || phase === 'loading') && h('span', { class: 'spinner', role: 'img', 'aria-label': busy || title })
      ),
      h('p', { class: 'soft' }, busy ? `${busy} …` : told),
      isOpen &&
        h(
          'p',
          { class: 'changes' },
          changes?.voxels
            ? `Not submitted: ${plural(changes.voxels, 'voxel')} in ${plural(changes.slices, 'slice')}`
            : h('span', { class: 'soft' }, 'No changes')
        ),
      h(
        'div',
        { class: 'row' },
        isOpen && this.#button('Submit …', () => session.review(), {
          class: (session.isHandedOut || session.isChanged) && !session.check ? 'main grow submit' : 'grow submit',
          disabled: (!session.isHandedOut && !session.isChanged) || Boolean(session.check),
        }),
        session.isHandedOut && isOpen
          ? this.#button('Skip …', () => this.#ask('skip', () => session.next(this.reason)), { class: 'skip' })
          : this.#button(phase === 'none-left' ? 'Look again' : 'Next scan', () => this.#leave(() => session.next()), {
              class: session.isChanged ? 'next' : 'main grow next',
            })
      )
    );
  }

  #standing() {
    const { scan } = this.session;
    const lease = scan?.lease;
    if (lease?.is_own) {
      return `Handed out to you until ${when(lease.until)}`;
    }
    if (lease) {
      return `Handed out to ${lease.to ?? 'another browser'} until ${when(lease.until)}`;
    }
    const states = /** @type {Record<string, string>} */ ({
      unlabelled: 'Not handed out',
      rejected: 'Not handed out',
      submitted: 'Submitted, waits for a review',
      approved: 'Approved',
      excluded: `Excluded${scan?.reason ? `: ${scan.reason}` : ''}`,
    });
    return states[scan?.state ?? ''] ?? '';
  }

  // ---------------------------------------------------------------------------------------------------------- notices

  #drawNotices() {
    const { session } = this;
    const { scan, notice, elsewhere } = session;
    const found = [];
    if (notice) {
      found.push(this.#notice(notice.kind, notice.text));
    }
    if (elsewhere) {
      found.push(this.#notice('warning', elsewhere));
    }
    if (session.phase === 'ready' && scan) {
      const { submitted } = session;
      if (submitted && submitted.state !== 'none') {
        const goThere = /** @type {[string, () => unknown][]} */ (
          session.isToLookAgain ? [['Look again', () => session.jump(session.ranked[0])]] : []
        );
        found.push(this.#notice(submitted.errors?.length ? 'warning' : 'note', submitted.sentence, goThere));
      }
      if (scan.state === 'rejected') {
        found.push(this.#notice('warning', `Rejected: ${scan.reason}`));
      }
      if (session.draft) {
        found.push(
          this.#notice('warning', 'You left this scan with changes that were not submitted.', [
            ['Bring them back', () => session.settleDraft(true)],
            ['Drop them', () => session.settleDraft(false)],
          ])
        );
      }
      if (session.hasMovedOn && !session.conflict) {
        found.push(
          this.#notice('warning', `Version ${scan.label?.version} counts by now, and you began with ${this.#began()}.`, [
            ['Load it', () => this.#leave(() => session.reload())],
          ])
        );
      }
      const asked = scan.lease?.slices;
      if (asked) {
        const numbers = asked.map(instance => this.#number(instance)).sort((one, other) => one - other);
        found.push(this.#notice('note', `Correct ${numbers.length > 1 ? 'slices' : 'slice'} ${inWords(numbers)} only.`));
      }
      if (session.isReconstructed) {
        const text = 'Painting in reconstructed planes may change neighbouring slices, too. Paint in the slices.';
        found.push(this.#notice('warning', text));
      }
      found.push(...scan.warnings.map(warning => this.#notice('warning', warning)));
    }
    put(this.parts.notices, ...found);
  }

  /**
   * @param {string} kind
   * @param {string} text
   * @param {[string, () => unknown][]} [actions]
   */
  #notice(kind, text, actions = []) {
    const buttons = actions.map(([name, act]) => this.#button(name, act, { class: 'small' }));
    const sentence = text.charAt(0).toUpperCase() + text.slice(1);
    return h('div', { class: `notice ${kind}` }, sentence, buttons.length > 0 && h('div', { class: 'row wrap' }, ...buttons));
  }

  #began() {
    const { startedFrom } = this.session;
    return startedFrom === null ? 'an empty label map' : `version ${startedFrom}`;
  }

  // --------------------------------------------------------------------------------------------------------- questions

  /**
   * Do something that leaves the mask, after asking where changes would be lost.
   *
   * @param {() => unknown} act
   */
  #leave(act) {
    if (this.session.isChanged) {
      this.#ask('leave', act);
    } else {
      act();
    }
  }

  /**
   * @param {Question} question
   * @param {() => unknown} answer
   */
  #ask(question, answer) {
    Object.assign(this, { question, answer, reason: '' });
    this.asked = null;
    this.draw();
    /** @type {HTMLElement | null} */ (this.parts.question.querySelector('input, button'))?.focus();
  }

  #settle(isWanted = false) {
    const { answer } = this;
    this.question = null;
    this.draw();
    if (isWanted) {
      answer();
    }
  }

  #drawQuestion() {
    const { question, session } = this;
    this.parts.question.hidden = !question;
    if (!question || this.asked === question) {
      return; // what is typed stays
    }
    this.asked = question;
    const changes = session.mask?.changes;
    const lost = changes?.voxels
      ? `${plural(changes.voxels, 'changed voxel')} in ${plural(changes.slices, 'slice')} would be lost.`
      : '';
    const stay = this.#button('Stay', () => this.#settle(), { class: 'stay' });
    if (question === 'skip') {
      const go = /** @type {HTMLButtonElement} */ (
        this.#button('Skip', () => this.#settle(true), { class: 'main', disabled: true })
      );
      const input = h('input', {
        type: 'text',
        placeholder: 'Why?',
        'aria-label': 'Why the scan is skipped',
        list: 'reasons',
        maxlength: 500,
        input: (/** @type {Event} */ event) => {
          this.reason = /** @type {HTMLInputElement} */ (event.target).value.trim();
          go.disabled = !this.reason;
        },
        keydown: (/** @type {KeyboardEvent} */ event) => {
          if (event.key === 'Enter' && this.reason) {
            this.#settle(true);
          } else if (event.key === 'Escape') {
            this.#settle();
          }
        },
      });
      put(this.parts.question, 
        h('h2', {}, 'Skip this scan'),
        lost && h('p', {}, lost),
        h('p', {}, input),
        h('datalist', { id: 'reasons' }, ...REASONS.map(reason => h('option', { value: reason }))),
        h('div', { class: 'row' }, go, stay)
      );
      return;
    }
    put(this.parts.question, 
      h('h2', {}, 'Changes are not submitted'),
      h('p', {}, lost),
      h(
        'div',
        { class: 'row wrap' },
        this.#button('Submit first …', () => (this.#settle(), session.review()), { class: 'main' }),
        this.#button('Drop them', () => this.#settle(true), { class: 'drop' }),
        stay
      )
    );
  }

  // ------------------------------------------------------------------------------------------------------------ check

  #drawCheck() {
    const { session } = this;
    const { check, conflict } = session;
    this.parts.check.hidden = !check && !conflict;
    if (this.parts.check.hidden) {
      return;
    }
    const rows = (check?.structures ?? []).map(part =>
      h(
        'tr',
        {},
        h('td', {}, part.name),
        h('td', {}, part.voxels_changed ? plural(part.voxels_changed, 'voxel') : '–'),
        h('td', {}, part.voxels_changed ? dice(part.dice) : '–')
      )
    );
    const summary = check?.voxels_changed
      ? `${plural(check.voxels_changed, 'voxel')} in ${plural(check.slices_changed, 'slice')} changed.`
      : 'The label map is submitted as it was handed out.';
    const back = this.#button('Back', () => session.cancelReview(), { class: 'back' });
    put(this.parts.check, 
      h('h2', {}, conflict ? 'Conflict' : 'Submit'),
      check && h('p', {}, summary),
      check &&
        session.boxesTaken > 0 &&
        h('p', { class: 'soft' }, `Taken from the proposal: ${session.boxesTaken} of ${plural(session.proposal?.boxes.length ?? 0, 'box', 'boxes')}.`),
      check &&
        check.voxels_changed > 0 &&
        h(
          'table',
          {},
          h('tr', {}, h('th', {}, 'Structure'), h('th', {}, 'Changed'), h('th', { title: 'Of the start against the end' }, 'Dice')),
          ...rows
        ),
      ...(check?.warnings ?? [])
        .filter(warning => check?.voxels_changed || warning !== 'Nothing was changed.')
        .map(warning => this.#notice('warning', warning)),
      conflict && this.#notice('conflict', conflict),
      h(
        'div',
        { class: 'row wrap', style: 'margin-top: 8px' },
        !conflict && this.#button('Submit', () => session.submit(), { class: 'main grow confirm' }),
        conflict && this.#button('Keep mine beside it', () => session.submit(true), { class: 'main beside' }),
        conflict && session.hasMovedOn && this.#button('Load the newer one', () => session.reload(), { class: 'newer' }),
        back
      )
    );
  }

  // ---------------------------------------------------------------------------------------------------------- estimate

  #drawEstimate() {
    const { session } = this;
    const { scan } = session;
    if (!scan) {
      return;
    }
    const { estimate } = scan;
    const active = session.activeValue;
    const isEstimated = estimate !== null && estimate.version === session.startedFrom;
    const missing = !scan.has_networks
      ? 'No estimate yet: the networks are not trained.'
      : !scan.label
        ? 'There is no mask yet; paint one.'
        : 'No estimate of this label.';
    put(this.parts.estimate, 
      h('h2', {}, 'Estimated Dice'),
      estimate
        ? h(
            'div',
            { class: 'row', style: 'margin-bottom: 8px' },
            h('span', { class: 'dice' }, dice(estimate.dice)),
            h(
              'span',
              { class: 'soft' },
              between(estimate.interval),
              h('br'),
              isEstimated ? 'lowest structure' : `of version ${estimate.version}`
            )
          )
        : h('p', { class: 'soft' }, missing),
      h('ul', {}, ...scan.segments.map(segment => this.#segment(segment, active)))
    );
  }

  /**
   * @param {import('./server.js').Segment} segment
   * @param {number | undefined} active
   */
  #segment({ value, name, colour }, active) {
    const { session } = this;
    const found = session.scan?.estimate?.structures.find(structure => structure.values.includes(value));
    const isShown = !session.hiddenValues.has(value);
    return h(
      'li',
      { class: 'structure' },
      h(
        'button',
        {
          class: 'paint',
          'aria-pressed': String(value === active),
          title: `Paint ${name}`,
          click: () => session.activate(value),
        },
        h('span', { class: 'swatch', style: `background: ${colour}` }),
        h('span', { class: 'name' }, name),
        h('span', { title: found ? between(found.interval) : '' }, found ? (found.present ? dice(found.dice) : 'absent') : ''),
        found?.present && found.dice !== null && intervalBar(found.dice, found.interval)
      ),
      h(
        'button',
        {
          class: 'eye',
          'aria-pressed': String(isShown),
          'aria-label': `${isShown ? 'Hide' : 'Show'} ${name}`,
          title: isShown ? 'Hide' : 'Show',
          click: () => session.toggle(value),
        },
        icon(isShown ? 'eye' : 'hidden')
      )
    );
  }

  // ------------------------------------------------------------------------------------------------------------ slices

  /** The number of a slice: from 0, as pages, files and 3D Slicer's API count. @param {string} instance */
  #number(instance) {
    return this.session.scan?.instances.indexOf(instance) ?? -1;
  }

  #drawSlices() {
    const { session } = this;
    const { scan } = session;
    if (!scan) {
      return;
    }
    const errors = new Map((scan.estimate?.slices ?? []).map(slice => [slice.instance, slice.error_ml]));
    const now = session.instance;
    const here = now ? errors.get(now) : undefined;
    const boxes = scan.estimate?.boxes.filter(box => box.instance === now).length ?? 0;
    const told = here === undefined ? '' : `${ml(here)} likely wrong${boxes ? ` · ${boxes} ${boxes > 1 ? 'boxes' : 'box'}` : ''}`;
    const asked = new Set(scan.lease?.slices ?? []);
    const hasChanges = session.isChanged;
    const slicesKey = (/** @type {string} */ key) => (session.proposal?.chosen ? undefined : key); // else it is the boxes'
    put(this.parts.slices, 
      h('h2', {}, 'Slices'),
      this.#strip(errors, now, asked),
      h(
        'div',
        { class: 'row wrap legend' },
        errors.size > 0 && h('span', { style: '--c: var(--worst)' }, 'worst'),
        hasChanges && h('span', { style: '--c: var(--good)' }, 'changed'),
        asked.size > 0 && h('span', { style: '--c: var(--accent)' }, 'asked for')
      ),
      h('p', { style: 'margin-top: 4px' }, now ? `Slice ${this.#number(now)}${told && ' · '}` : '', h('span', { class: 'soft' }, told)),
      errors.size > 0 &&
        h(
          'div',
          { class: 'row' },
          this.#button('Previous', () => session.jumpByRank(-1), { class: 'small grow', title: 'The slice that is worse' }, slicesKey('P')),
          this.#button('Next worst', () => session.jumpByRank(1), { class: 'small grow' }, slicesKey('N'))
        )
    );
  }

  /**
   * A bar for each slice, in the order of the scan's file.
   *
   * @param {Map<string, number>} errors
   * @param {string | null} now
   * @param {Set<string>} asked
   */
  #strip(errors, now, asked) {
    const { session } = this;
    const instances = session.scan?.instances ?? [];
    const worst = new Set(session.scan?.estimate?.worst_slices ?? []);
    const most = Math.max(1e-9, ...errors.values());
    const room = STRIP.height - STRIP.top - STRIP.bottom;
    const bars = instances.map((instance, i) => {
      const error = errors.get(instance) ?? 0;
      const height = Math.max(1, (room * error) / most);
      const y = STRIP.height - STRIP.bottom - height;
      const title = `Slice ${i}${errors.size ? `: ${ml(error)} likely wrong` : ''}`;
      const foot = STRIP.height - STRIP.bottom;
      return s(
        'g',
        { click: () => session.jump(instance), 'data-slice': i },
        s('title', {}, title),
        instance === now && s('rect', { class: 'now', x: i, y: 0, width: 1, height: foot }),
        s('rect', { class: worst.has(instance) ? 'bar worst' : 'bar', x: i + 0.1, y, width: 0.8, height }),
        session.mask !== null && session.mask.changed[i] > 0 && s('rect', { class: 'changed', x: i + 0.1, y: foot + 2, width: 0.8, height: 3 }),
        asked.has(instance) && s('rect', { class: 'asked', x: i + 0.1, y: foot + 6, width: 0.8, height: 3 }),
        instance === now && s('rect', { class: 'edge', x: i, y: foot, width: 1, height: 1.5 }),
        s('rect', { class: 'hit', x: i, y: 0, width: 1, height: STRIP.height })
      );
    });
    return s(
      'svg',
      {
        class: 'strip',
        viewBox: `0 0 ${instances.length} ${STRIP.height}`,
        preserveAspectRatio: 'none',
        role: 'img',
        'aria-label': 'Likely errors of each slice; press N for the next worst one',
      },
      ...bars
    );
  }

  // ---------------------------------------------------------------------------------------------------------- proposal

  #drawProposal() {
    const { session } = this;
    const { proposal, mask } = session;
    this.parts.proposal.hidden = !proposal?.boxes.length;
    if (!proposal || !mask || this.parts.proposal.hidden) {
      return;
    }
    const open = new Set(proposal.open(mask));
    const list = this.parts.proposal.querySelector('ul');
    const scrolled = list?.scrollTop ?? 0;
    put(this.parts.proposal,
      h('h2', {}, 'Proposal'),
      h(
        'p',
        { class: 'soft' },
        'What SegQC-Net would change. Nothing is changed before you take it, and Undo takes it back. ',
        proposal.boxes.length > 1 && 'Look at a box: N and P then go on to the others.'
      ),
      h('ul', { class: 'boxes' }, ...proposal.boxes.map(box => this.#proposed(box, open.has(box)))),
      h(
        'div',
        { class: 'row', style: 'margin-top: 6px' },
        this.#button(open.size < proposal.boxes.length ? 'Take the rest' : 'Take all', () => session.takeBox(), {
          class: 'small grow take-all',
          disabled: !open.size,
        }),
        h('span', { class: 'soft' }, `${session.boxesTaken} of ${proposal.boxes.length} taken`)
      )
    );
    const drawn = this.parts.proposal.querySelector('ul');
    if (drawn) {
      drawn.scrollTop = scrolled;
      if (proposal.chosen !== this.chosen) {
        drawn.querySelector('[aria-pressed="true"]')?.scrollIntoView({ block: 'nearest' });
        this.chosen = proposal.chosen;
      }
    }
  }

  /**
   * @param {import('./proposal.js').ProposedBox} box
   * @param {boolean} isOpen
   */
  #proposed(box, isOpen) {
    const { session } = this;
    const slice = this.#number(box.instance);
    const goes = box.places.length - box.adds;
    const what = [box.adds > 0 && `+${box.adds}`, goes > 0 && `−${goes}`].filter(Boolean).join(' ');
    const colour = session.scan?.segments.find(segment => box.values.includes(segment.value))?.colour;
    const name = `${box.structure} in slice ${slice}, ${what} voxels`;
    return h(
      'li',
      { class: 'row' },
      h(
        'button',
        {
          type: 'button',
          class: 'small box grow',
          'aria-pressed': String(session.proposal?.chosen === box),
          'aria-label': `Look at ${name}`,
          title: 'Look at it; N and P go on to the next one and back',
          click: () => session.choose(box),
        },
        h('span', { class: 'swatch', style: `background: ${colour ?? '#fff'}` }),
        h('span', { class: 'name grow' }, `Slice ${slice}, ${box.structure}`),
        h('span', { class: 'soft' }, what)
      ),
      this.#button(isOpen ? 'Take' : 'Taken', () => session.takeBox(box), {
        class: 'small take',
        disabled: !isOpen,
        'aria-label': `${isOpen ? 'Take' : 'Taken'}: ${name}`,
      })
    );
  }

  // ------------------------------------------------------------------------------------------------------------- tools

  /** Sliders are made once: one that is held must not be made anew. */
  #makeTools() {
    const { session } = this;
    const slider = (/** @type {string} */ name, /** @type {number[]} */ [min, max, step], /** @type {(value: number) => void} */ set) =>
      /** @type {HTMLInputElement} */ (
        h('input', {
          type: 'range', 'aria-label': name, min, max, step,
          input: (/** @type {Event} */ event) => set(Number(/** @type {HTMLInputElement} */ (event.target).value)),
        })
      ); // prettier-ignore
    const check = (/** @type {string} */ name, /** @type {(value: boolean) => void} */ set) =>
      /** @type {HTMLInputElement} */ (
        h('input', {
          type: 'checkbox', 'aria-label': name,
          change: (/** @type {Event} */ event) => set(/** @type {HTMLInputElement} */ (event.target).checked),
        })
      ); // prettier-ignore
    const tool = (/** @type {'brush' | 'eraser'} */ name, /** @type {string} */ text) =>
      h('button', { class: `grow ${name}`, click: () => session.take(name) }, icon(name), text);
    const step = (/** @type {'undo' | 'redo'} */ name, /** @type {string} */ title) =>
      h('button', { class: name, 'aria-label': title, title, click: () => session.mask?.[name]() }, icon(name));
    const controls = {
      brush: tool('brush', 'Brush'),
      eraser: tool('eraser', 'Eraser'),
      undo: step('undo', 'Undo (Ctrl Z)'),
      redo: step('redo', 'Redo (Ctrl Shift Z)'),
      size: slider('Size of the brush', [0.5, 40, 0.5], brush => session.prefer({ brush })),
      sizeTold: h('output'),
      boxes: check('Error boxes', boxes => session.prefer({ boxes })),
      proposal: check('Proposal', proposal => session.prefer({ proposal })),
      map: check('Error map', map => session.prefer({ map })),
      opacity: slider('Opacity of the error map', [0.05, 1, 0.05], opacity => session.prefer({ opacity, map: true })),
      opacityTold: h('output'),
      mapTold: h('p', { class: 'soft' }),
    };
    this.controls = controls;
    put(this.parts.tools, 
      h('h2', {}, 'Paint'),
      h('div', { class: 'row' }, controls.brush, controls.eraser, controls.undo, controls.redo),
      h('div', { class: 'row', style: 'margin: 6px 0 10px' }, controls.size, controls.sizeTold),
      h('h2', {}, 'Likely errors'),
      h(
        'div',
        { class: 'row', style: 'margin-bottom: 6px; gap: 16px' },
        h('label', {}, controls.boxes, 'Boxes'),
        h('label', {}, controls.proposal, 'Proposal')
      ),
      h('div', { class: 'row' }, h('label', {}, controls.map, 'Map'), controls.opacity, controls.opacityTold),
      controls.mapTold
    );
  }

  #drawTools() {
    const { session, controls } = this;
    if (!controls) {
      return;
    }
    const { boxes, proposal, map, opacity, brush } = session.preferences;
    const inHand = toolInHand(session.services);
    controls.brush.setAttribute('aria-pressed', String(inHand === 'brush'));
    controls.eraser.setAttribute('aria-pressed', String(inHand === 'eraser'));
    /** @type {HTMLButtonElement} */ (controls.undo).disabled = !session.mask?.done.length;
    /** @type {HTMLButtonElement} */ (controls.redo).disabled = !session.mask?.undone.length;
    controls.size.value = String(brush);
    controls.sizeTold.textContent = `${brush} mm`;
    controls.boxes.checked = boxes;
    controls.proposal.checked = proposal;
    controls.proposal.disabled = !session.proposal?.boxes.length;
    controls.map.checked = map;
    controls.opacity.value = String(opacity);
    controls.opacityTold.textContent = `${Math.round(100 * opacity)}%`;
    const isEstimated = session.scan?.estimate !== null;
    for (const control of [controls.boxes, controls.map, controls.opacity]) {
      control.disabled = !isEstimated;
    }
    const told = { none: '', there: '', loading: 'The error map is being computed …' };
    controls.mapTold.textContent = session.errorMap in told ? told[/** @type {keyof typeof told} */ (session.errorMap)] : session.errorMap;
  }

  // ----------------------------------------------------------------------------------------------------------- history

  #drawHistory() {
    const { scan } = this.session;
    if (!scan) {
      return;
    }
    const isOpen = this.parts.history.querySelector('details')?.open ?? false;
    this.parts.history.hidden = !scan.history.length;
    put(this.parts.history, 
      h(
        'details',
        { open: isOpen },
        h('summary', {}, `History: ${plural(scan.history.length, 'version')}`),
        h('ul', { class: 'history' }, ...scan.history.map(version => this.#version(version)))
      )
    );
  }

  /** @param {Version} version */
  #version(version) {
    const { session } = this;
    const counts = version.version === session.scan?.label?.version;
    const who = version.is_own ? 'you' : (version.by ?? 'another browser');
    const how = SOURCES[version.source];
    const from = version.made_of === null ? '' : `, from ${version.made_of}`;
    const isFinal = version.tag === 'final' && version.has_voxels && !version.is_current;
    return h(
      'li',
      {},
      h(
        'div',
        { class: 'row' },
        h('strong', {}, String(version.version)),
        h('span', { class: counts ? 'tag current' : 'tag' }, version.tag),
        h('span', { class: 'soft grow', style: 'text-align: right', title: new Date(version.made_at).toLocaleString() }, when(version.made_at))
      ),
      h('div', { class: 'soft name', title: who }, `${how ? `${how}, ` : ''}${version.source === 'network' ? '' : who}`.replace(/, $/, '') + from),
      version.has_voxels &&
        h(
          'div',
          { class: 'row', style: 'margin-top: 4px' },
          this.#button('Load', () => session.load(version.version), {
            class: 'small',
            title: 'Put it in the place of the mask, as a change that can be undone',
          }),
          isFinal &&
            this.#button('Restore', () => this.#leave(() => session.restore(version.version)), {
              class: 'small',
              title: 'Let it be the final label again',
            })
        )
    );
  }

  /**
   * @param {string} text
   * @param {() => unknown} act
   * @param {Record<string, any>} [attributes]
   * @param {string} [key]
   */
  #button(text, act, attributes = {}, key) {
    const disabled = attributes.disabled || Boolean(this.session.busy);
    return h('button', { type: 'button', ...attributes, disabled, click: act }, text, Boolean(key) && h('kbd', {}, key ?? ''));
  }
}

/** @param {Interval | null} interval */
function between(interval) {
  return interval ? `${dice(interval.low)} – ${dice(interval.high)}` : 'no interval';
}

/**
 * @param {number} value
 * @param {Interval | null} interval
 */
function intervalBar(value, interval) {
  const at = (/** @type {number} */ part) => `${100 * Math.min(1, Math.max(0, part))}%`;
  return h(
    'span',
    { class: 'interval', title: between(interval) },
    interval && h('i', { style: `left: ${at(interval.low)}; right: ${at(1 - interval.high)}` }),
    h('b', { style: `left: ${at(value)}` })
  );
}

/** @param {number[]} numbers */
function inWords(numbers) {
  const last = numbers.at(-1);
  return numbers.length > 1 ? `${numbers.slice(0, -1).join(', ')} and ${last}` : String(last);
}

/** Whether a key is pressed in something that takes text. @param {Event} event */
function isTyping(event) {
  const target = event.composedPath()[0];
  if (!(target instanceof HTMLElement)) {
    return false;
  }
  const isText = target instanceof HTMLInputElement && !['checkbox', 'range', 'button', 'radio'].includes(target.type);
  return isText || target.isContentEditable || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}

/**
 * Define the element.
 *
 * @param {Session} session
 */
export function define(session) {
  Panel.session = session;
  if (!customElements.get(ELEMENT)) {
    customElements.define(ELEMENT, Panel);
  }
}
