/** How the panel looks: in the colours of OHIF. */
export const style = new CSSStyleSheet();

style.replaceSync(`
  :host {
    --text: #fff;
    --soft: #a9b8d6;
    --line: #1d2b57;
    --card: #0a1330;
    --hover: #14224f;
    --accent: #5acce6;
    --worst: #ff9f43;
    --good: #4ade80;
    --bad: #ff8f8f;
    display: block;
    box-sizing: border-box;
    height: 100%;
    min-height: 0;
    overflow-y: auto;
    scrollbar-width: thin;
    scrollbar-color: var(--line) transparent;
    padding: 10px;
    background: #000;
    color: var(--text);
    font: 13px/1.4 Inter, system-ui, sans-serif;
    font-variant-numeric: tabular-nums;
  }
  *, *::before, *::after { box-sizing: border-box; }
  [hidden] { display: none !important; }
  section { margin-bottom: 10px; padding: 10px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
  section.plain { padding: 0 2px; border: 0; background: none; }
  h2 { margin: 0 0 6px; color: var(--soft); font-size: 11px; font-weight: 600; letter-spacing: .05em; text-transform: uppercase; }
  p { margin: 0 0 6px; }
  p:last-child { margin-bottom: 0; }
  .soft { color: var(--soft); font-size: 12px; }
  .row { display: flex; align-items: center; gap: 6px; }
  .row > .grow { flex: 1; min-width: 0; }
  .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .title { font-size: 15px; font-weight: 600; }
  .wrap { flex-wrap: wrap; }

  button, input { font: inherit; color: inherit; }
  button {
    display: inline-flex; align-items: center; justify-content: center; gap: 6px;
    min-height: 30px; padding: 4px 10px; border: 1px solid var(--line); border-radius: 5px;
    background: transparent; cursor: pointer;
  }
  button:hover:not(:disabled) { background: var(--hover); }
  button:disabled { opacity: .45; cursor: default; }
  button.main { border-color: var(--accent); background: var(--accent); color: #03162b; font-weight: 600; }
  button.main:hover:not(:disabled) { background: #86dcef; }
  button.small { min-height: 24px; padding: 1px 7px; font-size: 12px; }
  button[aria-pressed='true'] { border-color: var(--accent); background: #10315a; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
  kbd {
    min-width: 16px; padding: 0 4px; border: 1px solid #3a4d80; border-radius: 3px;
    color: var(--soft); font: 11px/15px inherit; text-align: center;
  }
  .main kbd { border-color: #2a6e80; color: #0a3a4a; }

  input[type='text'] { width: 100%; min-height: 30px; padding: 4px 8px; border: 1px solid #3a4d80; border-radius: 5px; background: #000; }
  input[type='range'] { flex: 1; min-width: 0; height: 18px; accent-color: var(--accent); }
  input[type='checkbox'] { width: 15px; height: 15px; margin: 0; accent-color: var(--accent); }
  label { display: flex; align-items: center; gap: 6px; cursor: pointer; }
  output { min-width: 44px; color: var(--soft); font-size: 12px; text-align: right; white-space: nowrap; }

  .notice { padding: 8px 10px; border-left: 3px solid var(--accent); border-radius: 4px; background: #0d2037; }
  .notice.kept { border-color: var(--good); background: #0c2b1c; }
  .notice.problem, .notice.conflict { border-color: var(--bad); background: #331318; }
  .notice.warning { border-color: var(--worst); background: #2e1f0c; }
  .notice + .notice { margin-top: 6px; }
  .notices { margin-bottom: 10px; }
  .notices:empty { display: none; }
  .notice .row { margin-top: 8px; }

  .dice { font-size: 26px; font-weight: 600; line-height: 1.1; }
  .interval { position: relative; height: 4px; border-radius: 2px; background: #22305c; }
  .interval i { position: absolute; top: 0; bottom: 0; border-radius: 2px; background: #5f7fc4; }
  .interval b { position: absolute; top: -3px; width: 2px; height: 10px; background: #fff; }

  ul { margin: 0; padding: 0; list-style: none; }
  .structure { display: grid; grid-template-columns: 1fr auto; align-items: center; border-radius: 5px; }
  .structure > .paint {
    display: grid; grid-template-columns: 12px 1fr auto; gap: 2px 8px; width: 100%; min-height: 34px;
    padding: 4px 6px; border-color: transparent; text-align: left;
  }
  
  .structure > .paint > .interval { grid-column: 2 / 4; }
  .swatch { width: 12px; height: 12px; border-radius: 3px; }
  .eye { width: 30px; min-height: 30px; padding: 0; border-color: transparent; color: var(--soft); }
  .eye[aria-pressed='true'] { border-color: transparent; background: none; color: var(--text); }
  .undo, .redo { padding: 4px 7px; }
  .brush, .eraser { padding: 4px 6px; }
  svg.icon { flex: none; width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round; }

  .strip { display: block; width: 100%; height: 64px; cursor: pointer; }
  .strip rect.bar { fill: #4663a8; }
  .strip rect.worst { fill: var(--worst); }
  .strip rect.now { fill: #fff; fill-opacity: .16; }
  .strip rect.edge { fill: #fff; }
  .strip rect.asked { fill: var(--accent); }
  .strip rect.changed { fill: var(--good); }
  .strip g:hover rect.hit { fill: #fff; fill-opacity: .12; }
  .strip rect.hit { fill: transparent; }
  .legend { gap: 4px 12px; margin-top: 4px; color: var(--soft); font-size: 11px; }
  .legend span::before { content: ''; display: inline-block; width: 8px; height: 8px; margin-right: 4px; border-radius: 2px; background: var(--c); }

  .boxes { max-height: 190px; overflow-y: auto; scrollbar-width: thin; scrollbar-color: var(--line) transparent; }
  .boxes li { padding: 2px 2px 2px 0; }
  .boxes .box { justify-content: flex-start; border-color: transparent; text-align: left; }
  .boxes .box[aria-pressed='true'] { border-color: var(--accent); }
  .boxes .take { min-width: 58px; }

  table { width: 100%; border-collapse: collapse; }
  th { color: var(--soft); font-size: 11px; font-weight: 500; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  td { padding: 2px 0; text-align: right; }
  .history li { padding: 6px 0; border-top: 1px solid var(--line); }
  .history li:first-child { border-top: 0; }
  .tag { padding: 0 6px; border-radius: 8px; background: #1b2c5e; color: var(--soft); font-size: 11px; line-height: 17px; white-space: nowrap; }
  .tag.current { background: #11492b; color: #a7f3c4; }
  summary { cursor: pointer; color: var(--soft); font-size: 11px; font-weight: 600; letter-spacing: .05em; text-transform: uppercase; }
  details[open] summary { margin-bottom: 4px; }
  .spinner { width: 14px; height: 14px; border: 2px solid var(--line); border-top-color: var(--accent); border-radius: 50%; animation: turn .8s linear infinite; }
  @keyframes turn { to { transform: rotate(1turn); } }
  @media (prefers-reduced-motion: reduce) { .spinner { animation-duration: 4s; } }
`);
